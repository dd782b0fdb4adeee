// Tensor maps, made by the driver. Its entry point is looked up at run time: nothing is linked against the driver, so
// the module can be imported where there is none.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../launchers.h"
#include "launch.cuh"

namespace gradnorm {

// The map of a tensor of 2-byte elements whose element (i, j, k) lies at address + 2 i + strides[0] j + strides[1] k,
// for i < sizes[0] and so on. A box is copied under the 128-byte swizzle; what of it lies outside becomes zero.
inline CUtensorMap encode_tensor_map(const void* address, int type, const uint64_t (&sizes)[3],
                                     const uint64_t (&strides)[2], const uint32_t (&box)[3], const char* name) {
  static const auto encode = [name] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found), name);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found), name);
#endif
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
      throw std::runtime_error(std::string(name) + ": the driver has no tensor maps; CUDA 12.0 has");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  CUtensorMap map;
  const uint32_t every[3] = {1, 1, 1};
  const CUresult code = encode(
      &map, type == kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(address), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + ": the driver refused a tensor map, error " + std::to_string(code));
  }
  return map;
}

}  // namespace gradnorm
