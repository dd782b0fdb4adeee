// Tensor maps on the host: laid over csrc/device/sm90_encode.cuh in the tests' copy of csrc. The driver's conditions
// (cuTensorMapEncodeTiled) are checked, and that the address is one of a buffer, for want of which loads on a GPU fault
// even where all they read is inside one. The rest is sm90_host.h's.
#pragma once

#include <cuda_runtime.h>
#include <sm90_host.h>

#include <stdexcept>
#include <string>

namespace gradnorm {

inline host::TensorMap encode_tensor_map(const void* address, int, const uint64_t (&sizes)[3],
                                         const uint64_t (&strides)[2], const uint32_t (&box)[3], const char* name) {
  bool allowed = reinterpret_cast<uintptr_t>(address) % 16 == 0 && box[0] * 2 % 16 == 0 && box[0] * 2 <= 128;
  for (uint64_t size : sizes) allowed &= size > 0 && size <= uint64_t{1} << 32;
  // What a stride of 0 does is said nowhere.
  for (uint64_t stride : strides) allowed &= stride > 0 && stride % 16 == 0 && stride < uint64_t{1} << 40;
  for (uint32_t side : box) allowed &= side > 0 && side <= 256;
  if (!allowed) throw std::runtime_error(std::string(name) + ": the driver would refuse this tensor map");
  if (host::regions_at(reinterpret_cast<uintptr_t>(address)).empty()) {
    throw std::runtime_error(std::string(name) + ": a tensor map begins outside of every buffer");
  }
  host::TensorMap map;
  map.address = reinterpret_cast<uintptr_t>(address);
  std::copy(std::begin(sizes), std::end(sizes), map.sizes);
  std::copy(std::begin(strides), std::end(strides), map.strides);
  std::copy(std::begin(box), std::end(box), map.box);
  return map;
}

}  // namespace gradnorm
