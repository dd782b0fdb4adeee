// Hopper's asynchronous instructions: mbarriers, tensor copies (TMA), wgmma and its fences, setmaxnreg. All inline
// assembly of sm_90a is here, so that the tests can give the same names a meaning on the host (tests/cuda_host).
//
// Section numbers are those of the PTX ISA, version 9.0.
#pragma once

#include <cuda.h>

#include "ptx_sm80.cuh"

namespace gradnorm {

using TensorMap = CUtensorMap;

// Sections on mbarrier: a phase ends when `count` arrivals and all announced bytes are in.
__device__ __forceinline__ void mbarrier_init(SharedAddress barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the copy engine, which works through the async proxy. sync_block follows.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// An arrival at the mbarrier at the same place in another block of the cluster (section on mapa).
__device__ __forceinline__ void mbarrier_arrive_at(int rank, SharedAddress barrier) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// One arrival that also announces `bytes` still to be copied in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(SharedAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity: 0 is the first phase, and parity 1 of a fresh barrier counts as ended.
// The default semantics, acquire in the block, make what came before the arrivals visible.
__device__ __forceinline__ void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// The same for arrivals from every block of the cluster.
__device__ __forceinline__ void mbarrier_wait_cluster(SharedAddress barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Section on barrier.cluster: all threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Section on cp.async.bulk.tensor: copies the map's box at (column, row, base) to `to`. `barrier` counts all of its
// bytes, also those outside the map, which arrive as zeros.
__device__ __forceinline__ void tensor_load(SharedAddress to, const TensorMap* map, SharedAddress barrier, int column,
                                            int row, int base) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      :
      : "r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(base)
      : "memory");
}

// The same into every block of the cluster whose bit is set in `blocks`, at the same place, counted by the mbarrier at
// the same place there.
__device__ __forceinline__ void tensor_load_multicast(SharedAddress to, const TensorMap* map, SharedAddress barrier,
                                                      int column, int row, int base, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;"
      :
      : "r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(base), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// 9.7.15.7.1 wgmma.fence: before the first wgmma that uses registers the program has touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// 9.7.15.7.2 wgmma.commit_group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// 9.7.15.7.3 wgmma.wait_group: until at most kLater groups are in flight; their accumulators may not be touched.
template <int kLater>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLater) : "memory");
}

// Keeps the compiler from reading accumulators before the wait that stands in front of this.
template <int kCount>
__device__ __forceinline__ void wgmma_results(float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Lane 0's value, which the compiler then knows to be the same in all lanes.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Section on setmaxnreg: by all warps of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 9.7.15.5.2 wgmma.mma_async: sum[64, kColumns] = a[64, 16] b[16, kColumns], plus what it was if `add`, in fp32, by the
// 128 threads of a warpgroup. `a` and `b` describe operands in shared memory; kMajor says of both whether M and N (1)
// or K (0) is contiguous. Thread t has in sum[4 j + e] the element of row 16 (t / 32) + t % 32 / 4 + 8 (e / 2) and
// column 8 j + 2 (t % 4) + e % 2 (9.7.15.5.1.1).
template <int kType, int kColumns, int kMajor>
struct Wgmma;

#define GRADNORM_REGISTERS_128 \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GRADNORM_REGISTERS_192 \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GRADNORM_REGISTERS_256 \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define GRADNORM_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define GRADNORM_16(i) GRADNORM_4(i), GRADNORM_4(i + 4), GRADNORM_4(i + 8), GRADNORM_4(i + 12)
#define GRADNORM_OPERANDS_128 GRADNORM_16(0), GRADNORM_16(16), GRADNORM_16(32), GRADNORM_16(48)
#define GRADNORM_OPERANDS_192 GRADNORM_OPERANDS_128, GRADNORM_16(64), GRADNORM_16(80)
#define GRADNORM_OPERANDS_256 GRADNORM_OPERANDS_192, GRADNORM_16(96), GRADNORM_16(112)
#define GRADNORM_WGMMA(type, name, n, a_operand, b_operand, add_operand, major_operand)                                \
  template <int kMajor>                                                                                                \
  struct Wgmma<type, n, kMajor> {                                                                                      \
    static __device__ __forceinline__ void multiply(float (&sum)[n / 2], uint64_t a, uint64_t b, int add) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" add_operand ", 0;\n"                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" GRADNORM_REGISTERS_##n         \
                   "}, %" a_operand ", %" b_operand ", p, 1, 1, %" major_operand ", %" major_operand ";\n}"            \
                   : GRADNORM_OPERANDS_##n                                                                             \
                   : "l"(a), "l"(b), "r"(add), "n"(kMajor));                                                           \
    }                                                                                                                  \
  };
GRADNORM_WGMMA(kBFloat16, "bf16", 128, "64", "65", "66", "67")
GRADNORM_WGMMA(kBFloat16, "bf16", 192, "96", "97", "98", "99")
GRADNORM_WGMMA(kBFloat16, "bf16", 256, "128", "129", "130", "131")
GRADNORM_WGMMA(kFloat16, "f16", 128, "64", "65", "66", "67")
GRADNORM_WGMMA(kFloat16, "f16", 192, "96", "97", "98", "99")
GRADNORM_WGMMA(kFloat16, "f16", 256, "128", "129", "130", "131")
#undef GRADNORM_WGMMA
#undef GRADNORM_OPERANDS_256
#undef GRADNORM_OPERANDS_192
#undef GRADNORM_OPERANDS_128
#undef GRADNORM_16
#undef GRADNORM_4
#undef GRADNORM_REGISTERS_256
#undef GRADNORM_REGISTERS_192
#undef GRADNORM_REGISTERS_128

}  // namespace gradnorm
