// Launching a kernel, and saying which one failed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace gradnorm {

// Throws std::runtime_error that names the launch.
inline void check(cudaError_t code, const char* launch) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(launch) + ": " + cudaGetErrorString(code));
}

// Launches `blocks` blocks of a kernel, in clusters of `cluster` neighbours, with `shared` bytes of dynamic shared
// memory each.
template <typename... Expected, typename... Given>
void launch_clusters(const char* name, void (*kernel)(Expected...), int64_t blocks, int cluster, int threads,
                     int shared, void* stream, Given&&... given) {
  // Said here: as the 32 bits of a grid, a larger number would be another one, and most of the work left undone.
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(name) + ": more than 2^31 - 1 blocks; use smaller batches");
  }
  if (shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  if (cluster > 1) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(given)...), name);
}

// The same without clusters.
template <typename... Expected, typename... Given>
void launch(const char* name, void (*kernel)(Expected...), int64_t blocks, int threads, int shared, void* stream,
            Given&&... given) {
  launch_clusters(name, kernel, blocks, 1, threads, shared, stream, std::forward<Given>(given)...);
}

}  // namespace gradnorm
