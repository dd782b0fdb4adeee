// What the kernels' sources take from the CUDA runtime, in plain C++: a launch runs the blocks one after another, in an
// order drawn from the seed, each by host::run_blocks. The blocks of a cluster run together.
#pragma once

#include <map>
#include <tuple>

#include "host.h"
#include "host_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct HostStream*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace host {
inline std::map<const void*, size_t> allowed_shared;
constexpr size_t kPlainShared = 48 << 10, kMostShared = 227 << 10;
}  // namespace host

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > host::kMostShared) return cudaErrorInvalidValue;
  host::allowed_shared[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t code) {
  if (code == cudaSuccess) return "no error";
  return host::error.empty() ? "invalid argument" : host::error.c_str();
}

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  const size_t allowed = std::max(host::kPlainShared, host::allowed_shared[reinterpret_cast<const void*>(kernel)]);
  const dim3 grid = config->gridDim;
  host::error.clear();
  if (config->dynamicSmemBytes > allowed) host::error = "more shared memory than the kernel was allowed";
  if (config->blockDim.x * config->blockDim.y * config->blockDim.z % host::kWarp != 0) host::error = "part of a warp";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) host::error = "an empty grid";
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) host::error = "too large a grid";
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& size = config->attrs[i].val.clusterDim;
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension || size.y != 1 || size.z != 1) {
      host::error = "an attribute that is not modelled";
    }
    cluster = size.x;
  }
  if (cluster == 0 || cluster > 8 || grid.x % cluster != 0) host::error = "a grid that is not made of clusters";
  if (!host::error.empty()) return cudaErrorInvalidValue;
  std::tuple<std::decay_t<Expected>...> arguments(std::forward<Given>(given)...);
  gridDim = grid;
  blockDim = config->blockDim;
  host::kernel_body = [&] { std::apply(kernel, arguments); };
  host::written.clear();
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  // A cluster's blocks are neighbours in x.
  std::vector<std::vector<uint3>> together;
  for (size_t i = 0; i < blocks.size(); i += cluster) together.emplace_back(&blocks[i], &blocks[i] + cluster);
  std::shuffle(together.begin(), together.end(), host::random_source);
  for (const std::vector<uint3>& at : together) {
    if (!host::run_blocks(at, config->dynamicSmemBytes)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

using std::max;
using std::min;
