// The machine's CUDA driver, as the CUDA runtime linked into this module sees it.
#include "device/launch.cuh"

namespace gradnorm {

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "driver_version");
  return version;
}

}  // namespace gradnorm
