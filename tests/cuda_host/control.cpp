// What a test sets and reads of the host execution, by ctypes.
#include <cuda_runtime.h>

#include <stdexcept>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Forget all buffers and start the draws from a seed.
EXPORT void host_reset(unsigned seed) {
  host::regions.clear();
  host::random_source.seed(seed);
  host::bank_conflicts = 0;
}

// Kernels may touch these bytes.
EXPORT void host_region(uintptr_t begin, size_t bytes) { host::regions.push_back({begin, begin + bytes}); }

// Rows of 16 bytes that ldmatrix had to fetch in another turn because of a bank conflict, since the last reset.
EXPORT uint64_t host_bank_conflicts() { return host::bank_conflicts; }

// In place of launchers that are not part of the host build.
EXPORT void host_left_out() { throw std::runtime_error("this launcher was left out of the host build"); }
