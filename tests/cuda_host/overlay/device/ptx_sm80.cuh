// The names of csrc/device/ptx_sm80.cuh on the host: laid over that file in the tests' copy of csrc.
//
// Asynchronous copies arrive at the wait for their group and not before; until then NaN lies there, and whoever looks
// is told. A group that nobody waits for is a fault, too.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <deque>

#include "../launchers.h"

namespace gradnorm {

using SharedAddress = uint32_t;

inline SharedAddress shared_base() { return host::kSharedBase; }

template <typename T>
T host_load_shared(SharedAddress at) {
  T value;
  std::memcpy(&value, host::shared_read(at, sizeof(T), sizeof(T), host::actor()), sizeof(T));
  return value;
}

template <typename T>
void host_store_shared(SharedAddress at, T value) {
  std::memcpy(host::shared_write(at, sizeof(T), sizeof(T), host::actor()), &value, sizeof(T));
}

inline float load_shared_float(SharedAddress at) { return host_load_shared<float>(at); }
inline float4 load_shared_float4(SharedAddress at) { return host_load_shared<float4>(at); }
inline double load_shared_double(SharedAddress at) { return host_load_shared<double>(at); }
inline int load_shared_int(SharedAddress at) { return host_load_shared<int>(at); }
inline int4 load_shared_int4(SharedAddress at) { return host_load_shared<int4>(at); }
inline void store_shared_float(SharedAddress at, float value) { host_store_shared(at, value); }
inline void store_shared_float4(SharedAddress at, float4 value) { host_store_shared(at, value); }
inline void store_shared_double(SharedAddress at, double value) { host_store_shared(at, value); }
inline void store_shared_int(SharedAddress at, int value) { host_store_shared(at, value); }
inline void store_shared_int4(SharedAddress at, int4 value) { host_store_shared(at, value); }

template <typename T>
T load_global(const T* at) {
  return host::global_read(at);
}
template <typename T>
void store_global(T* at, T value) {
  host::global_write(at, value);
}

struct HostCopy {
  SharedAddress to;
  uint8_t data[16];
};

// Each thread's copies: groups closed by copy_commit, the last one open.
inline std::vector<std::deque<std::vector<HostCopy>>> host_groups;

inline std::deque<std::vector<HostCopy>>& host_my_groups() {
  if (host::block.at_exit.empty()) {
    host_groups.assign(host::block.threads, std::deque<std::vector<HostCopy>>(1));
    host::block.at_exit.push_back([] {
      for (const auto& groups : host_groups) {
        for (const auto& group : groups) {
          if (!group.empty()) host::fail("a block ends with copies on their way");
        }
      }
    });
  }
  return host_groups[host::actor()];
}

inline void copy_async(SharedAddress to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) host::fail("a copy of %d bytes", bytes);
  HostCopy copy{to, {}};
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) host::fail("an asynchronous copy from an address that is not aligned");
  if (bytes > 0) {
    host::check_global(from, bytes, 16, "copy");
    std::memcpy(copy.data, from, bytes);
  }
  host::async_write_begin(to, 16, 16, host::actor());
  host_my_groups().back().push_back(copy);
}

inline void copy_commit() { host_my_groups().emplace_back(); }

template <int kLater>
void copy_wait() {
  auto& groups = host_my_groups();
  while (int(groups.size()) - 1 > kLater) {  // the open group is not waited for
    for (const HostCopy& copy : groups.front()) host::async_write_end(copy.to, 16, copy.data, host::actor());
    groups.pop_front();
  }
}

struct HostMatrices {
  SharedAddress row;
  uint32_t* to;
};

template <bool kTransposed>
void host_load_matrices(uint32_t (&to)[4], SharedAddress row) {
  HostMatrices mine{row, to};
  host::warp_collective(kTransposed ? "ldmatrix.trans" : "ldmatrix", mine, [](HostMatrices* (&lanes)[host::kWarp]) {
    const int first = host::actor() / host::kWarp * host::kWarp;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        const int lane = matrix * 8 + r;
        std::memcpy(elements[r], host::shared_read(lanes[lane]->row, 16, 16, first + lane), 16);
        const unsigned bank = 1u << (lanes[lane]->row / 16 % 8);
        if (banks & bank) ++host::bank_conflicts;
        banks |= bank;
      }
      for (int lane = 0; lane < host::kWarp; ++lane) {
        const int g = lane / 4, c = 2 * (lane % 4);
        const uint32_t low = kTransposed ? elements[c][g] : elements[g][c];
        const uint32_t high = kTransposed ? elements[c + 1][g] : elements[g][c + 1];
        lanes[lane]->to[matrix] = low | high << 16;
      }
    }
  });
}

inline void load_matrices(uint32_t (&to)[4], SharedAddress row) { host_load_matrices<false>(to, row); }
inline void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) { host_load_matrices<true>(to, row); }

template <int kType>
float host_widen(uint16_t bits) {
  if constexpr (kType == kBFloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  } else {
    static const std::vector<float> table = [] {
      std::vector<float> values(1 << 16);
      for (int i = 0; i < 1 << 16; ++i) {
        const int exponent = i >> 10 & 31, fraction = i & 1023;
        const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(float(fraction), -24)
                                           : std::ldexp(float(fraction | 1024), exponent - 25);
        values[i] = i >> 15 ? -size : size;
      }
      return values;
    }();
    return table[bits];
  }
}

struct HostProduct {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

template <int kType>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  HostProduct mine{sum, a, {b0, b1}};
  host::warp_collective("mma", mine, [](HostProduct* (&lanes)[host::kWarp]) {
    float a_tile[16][16], b_tile[16][8], sums[16][8];
    for (int lane = 0; lane < host::kWarp; ++lane) {
      const int g = lane / 4, c = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) {
        for (int half = 0; half < 2; ++half) {
          a_tile[g + i % 2 * 8][c + i / 2 * 8 + half] = host_widen<kType>(uint16_t(lanes[lane]->a[i] >> 16 * half));
          if (i < 2) b_tile[c + i * 8 + half][g] = host_widen<kType>(uint16_t(lanes[lane]->b[i] >> 16 * half));
          sums[g + i / 2 * 8][c + half] = lanes[lane]->sum[i / 2 * 2 + half];
        }
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) sums[m][n] += a_tile[m][k] * b_tile[k][n];
      }
    }
    for (int lane = 0; lane < host::kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) lanes[lane]->sum[i] = sums[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    }
  });
}

template <int kType>
uint32_t host_narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if constexpr (kType == kBFloat16) {
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    const uint32_t sign = bits >> 31 << 15;
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    // To the nearest even multiple of the last place, which is 2^-24 below 2^-14.
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const float steps = std::nearbyint(std::ldexp(size, 10 - exponent));
    return sign | (uint32_t(exponent + 14) * 1024 + uint32_t(steps));
  }
}

template <int kType>
uint32_t pack(float first, float second) {
  return host_narrow<kType>(first) | host_narrow<kType>(second) << 16;
}

template <typename T>
T shuffle_xor(T value, int mask) {
  struct Shuffle {
    T value, result;
  } mine{value, value};
  host::warp_collective("shfl", mine, [mask](Shuffle* (&lanes)[host::kWarp]) {
    for (int lane = 0; lane < host::kWarp; ++lane) lanes[lane]->result = lanes[lane ^ mask]->value;
  });
  return mine.result;
}

inline void sync_warp() { host::warp_sync(); }
inline void sync_block() { host::barrier_sync(0, host::block.size); }
inline void barrier_wait(int id, int threads) { host::barrier_sync(id, threads); }
inline void barrier_come(int id, int threads) { host::barrier_arrive(id, threads); }

}  // namespace gradnorm
