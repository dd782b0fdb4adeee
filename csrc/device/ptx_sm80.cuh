// The instructions the sm_80 kernels are made of: asynchronous copies, matrix fragments, products, barriers. All inline
// assembly of sm_80 is here, so that the tests can give the same names a meaning on the host (tests/cuda_host).
//
// Shared memory is one dynamic block, addressed by 32-bit addresses of the shared window. Kernels touch memory through
// these functions only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../launchers.h"

namespace gradnorm {

using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_base() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared_memory));
}

__device__ __forceinline__ float load_shared_float(SharedAddress at) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
  return value;
}

__device__ __forceinline__ float4 load_shared_float4(SharedAddress at) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(at)
               : "memory");
  return value;
}

__device__ __forceinline__ double load_shared_double(SharedAddress at) {
  double value;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(value) : "r"(at) : "memory");
  return value;
}

__device__ __forceinline__ int load_shared_int(SharedAddress at) {
  int value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  return value;
}

__device__ __forceinline__ int4 load_shared_int4(SharedAddress at) {
  int4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(at)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_float(SharedAddress at, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared_float4(SharedAddress at, float4 value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_shared_double(SharedAddress at, double value) {
  asm volatile("st.shared.f64 [%0], %1;" ::"r"(at), "d"(value) : "memory");
}

__device__ __forceinline__ void store_shared_int(SharedAddress at, int value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_int4(SharedAddress at, int4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

template <typename T>
__device__ __forceinline__ T load_global(const T* at) {
  return *at;
}

template <typename T>
__device__ __forceinline__ void store_global(T* at, T value) {
  *at = value;
}

// Copies `bytes` (0 to 16) from global to shared memory, fills the rest of the 16 bytes with zeros, and returns at once.
// Nothing is read if bytes is 0. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes));
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most `kLater` of this thread's groups are on their way. The others have arrived, for this thread.
template <int kLater>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// Four 8x8 matrices of 2-byte elements; lane 8 i + r names row r of matrix i (16 bytes). A lane gets, of each matrix,
// the elements (lane / 4, 2 (lane % 4)) and the next in the row.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// sum [16, 8] += a [16, 16] b [16, 8], in fp32, by the 32 lanes of a warp. With g = lane / 4, c = 2 (lane % 4), a lane has
// sum: (g, c), (g, c+1), (g+8, c), (g+8, c+1); a, in pairs along k: (g, c), (g+8, c), (g, c+8), (g+8, c+8);
// b, in pairs along k: (c, g), (c+8, g).
template <int kType>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == kBFloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two floats rounded to 2-byte elements, the first in the low half.
template <int kType>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t pair;
  if constexpr (kType == kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Barrier `id` (1 to 15; 0 is sync_block's) of `threads` threads, whole warps: wait for it, or only be counted.
__device__ __forceinline__ void barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_come(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace gradnorm
