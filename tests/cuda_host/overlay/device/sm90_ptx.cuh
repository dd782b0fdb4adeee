// The names of csrc/device/sm90_ptx.cuh on the host: laid over that file in the tests' copy of csrc. What they mean is
// in sm90_host.h.
#pragma once

#include <sm90_host.h>

#include "ptx_sm80.cuh"

namespace gradnorm {

using TensorMap = host::TensorMap;

inline void mbarrier_init(SharedAddress barrier, uint32_t count) { host::mbarrier_init(barrier, count); }
inline void mbarrier_init_fence() { host::mbarrier_init_fence(); }
inline void mbarrier_arrive(SharedAddress barrier) { host::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_at(int rank, SharedAddress barrier) { host::mbarrier_arrive_at(rank, barrier); }
inline void mbarrier_arrive_expect(SharedAddress barrier, uint32_t bytes) { host::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(SharedAddress barrier, uint32_t parity) { host::mbarrier_wait(barrier, parity); }
inline void mbarrier_wait_cluster(SharedAddress barrier, uint32_t parity) {
  host::mbarrier_wait(barrier, parity, true);
}
inline void cluster_sync() { host::cluster_sync(); }

inline void tensor_load(SharedAddress to, const TensorMap* map, SharedAddress barrier, int column, int row, int base) {
  host::tensor_load(to, *map, barrier, column, row, base);
}
inline void tensor_load_multicast(SharedAddress to, const TensorMap* map, SharedAddress barrier, int column, int row,
                                  int base, uint16_t blocks) {
  host::tensor_load_multicast(to, *map, barrier, column, row, base, blocks);
}
inline void tensor_map_prefetch(const TensorMap*) {}

inline int host_wgmma_type;  // of the operands; one kernel runs at a time

inline void wgmma_fence() { host::wgmma_fence(); }
inline void wgmma_commit() { host::wgmma_commit(); }
template <int kLater>
void wgmma_wait() {
  if (host_wgmma_type == kBFloat16) {
    host::wgmma_wait(kLater, host_widen<kBFloat16>);
  } else {
    host::wgmma_wait(kLater, host_widen<kFloat16>);
  }
}
template <int kCount>
void wgmma_results(float (&)[kCount]) {}

inline int warp_uniform(int value) {
  int first = value;
  int* mine = &first;
  host::warp_collective("shfl", mine, [](int** (&lanes)[host::kWarp]) {
    for (int lane = 1; lane < host::kWarp; ++lane) **lanes[lane] = **lanes[0];
  });
  return first;
}

template <int kRegisters>
void registers_release() {
  host::set_registers(kRegisters, false);
}
template <int kRegisters>
void registers_acquire() {
  host::set_registers(kRegisters, true);
}

template <int kType, int kColumns, int kMajor>
struct Wgmma {
  static void multiply(float (&sum)[kColumns / 2], uint64_t a, uint64_t b, int add) {
    host_wgmma_type = kType;
    host::wgmma(sum, kColumns, a, b, add != 0, kMajor);
  }
};

}  // namespace gradnorm
