// Launching a kernel, and saying which one failed.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace gradnorm {

// Throws std::runtime_error that names the launch.
inline void check(cudaError_t code, const char* launch) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(launch) + ": " + cudaGetErrorString(code));
}

// Launches a kernel with `shared` bytes of dynamic shared memory.
template <typename... Expected, typename... Given>
void launch(const char* name, void (*kernel)(Expected...), dim3 grid, int threads, int shared, void* stream,
            Given&&... given) {
  if (shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(given)...), name);
}

}  // namespace gradnorm
