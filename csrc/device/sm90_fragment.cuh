// A thread's part of a tile of the weight, as wgmma leaves it in registers: its sum of squares, and its way to memory.
#pragma once

#include "sm90_ptx.cuh"

namespace gradnorm::sm90 {

// Where a thread's fragment lies in the weight [d_out, d_in]: see Wgmma for which element is which. What of it is
// inside is worked out where it is asked for: registers are few in the largest tile.
struct Fragment {
  int row, column;  // of element 0
  int d_out, d_in;

  // Whether its two rows, 8 apart, are inside.
  __device__ __forceinline__ bool low() const { return row < d_out; }
  __device__ __forceinline__ bool high() const { return row + 8 < d_out; }
  // Element i is inside if its column in the fragment, 8 (i / 4) + i % 2, is below this.
  __device__ __forceinline__ int columns() const { return d_in - column; }

  template <int kCount>
  __device__ __forceinline__ float sum_of_squares(const float (&values)[kCount]) const {
    // What lies outside is left out by selection: a zero times an infinity of the other operand is NaN there.
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (columns() > 2 * kCount - 7) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i % 4] += values[i] * values[i];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i / 4 * 8 + i % 2 < columns()) sums[i % 4] += values[i] * values[i];
      }
    }
    return (low() ? sums[0] + sums[1] : 0.0f) + (high() ? sums[2] + sums[3] : 0.0f);
  }

  // Calls visit(value, next, at) for the pairs of neighbours in one of the two rows, or the elements one by one, that
  // are inside: `at` elements from the row's first.
  template <bool kPairs, int kCount, typename Visit>
  __device__ __forceinline__ void each(float (&values)[kCount], int upper, const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = i / 4 * 8 + i % 2;
      if (i / 2 % 2 != upper || (kPairs && i % 2 != 0)) continue;
      if (at < columns()) visit(values[i], values[kPairs ? i + 1 : i], at);
    }
  }
};

// Adds to one row of a fragment what `from`, the place of its first element, holds. kPairs, here and below: every row
// of the weight begins at a multiple of two elements, and so does every pair.
template <bool kPairs, int kCount>
__device__ __forceinline__ void add_row(const Fragment& in, int upper, float (&sum)[kCount], const float* from) {
  in.template each<kPairs>(sum, upper, [&](float& a, float& b, int at) {
    if constexpr (kPairs) {
      const float2 pair = load_global(reinterpret_cast<const float2*>(from + at));
      a += pair.x;
      b += pair.y;
    } else {
      a += load_global(from + at);
    }
  });
}

// Stores one row of a fragment in fp32.
template <bool kPairs, int kCount>
__device__ __forceinline__ void store_row(const Fragment& in, int upper, float (&sum)[kCount], float* to) {
  in.template each<kPairs>(sum, upper, [&](float a, float b, int at) {
    if constexpr (kPairs) {
      store_global(reinterpret_cast<float2*>(to + at), make_float2(a, b));
    } else {
      store_global(to + at, a);
    }
  });
}

// Stores one row of a fragment in kType.
template <int kType, bool kPairs, int kCount>
__device__ __forceinline__ void cast_row(const Fragment& in, int upper, float (&sum)[kCount], uint16_t* to) {
  in.template each<kPairs>(sum, upper, [&](float a, float b, int at) {
    if constexpr (kPairs) {
      store_global(reinterpret_cast<uint32_t*>(to + at), pack<kType>(a, b));
    } else {
      store_global(to + at, static_cast<uint16_t>(pack<kType>(a, 0.0f)));
    }
  });
}

// Four pairs a lane of columns 8 j + 2 (lane % 4), j = 0 .. 3, become the eight columns of j = lane % 4: the four lanes
// that share a row exchange what they hold, so that each can store 16 bytes.
__device__ __forceinline__ void exchange_pairs(uint32_t (&pairs)[4], int lane) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool set = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = mask == 1 ? 2 * i : i, high = low + mask;
      const uint32_t other = shuffle_xor(set ? pairs[low] : pairs[high], mask);
      if (set) {
        pairs[low] = other;
      } else {
        pairs[high] = other;
      }
    }
  }
}

// Stores a fragment whose columns are all inside in kType, 16 bytes at a time: rows of the weight begin at multiples of
// that. `weight` is the weight's first element, `pitch` leads from row to row.
template <int kType, int kCount>
__device__ __forceinline__ void cast_whole(const Fragment& in, int lane, const float (&sum)[kCount], int64_t pitch,
                                           uint16_t* weight) {
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    uint16_t* row = weight + (in.row + 8 * upper) * pitch + in.column + lane % 4 * 6;
#pragma unroll
    for (int i = 0; i < kCount; i += 16) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = i + 4 * j + 2 * upper;
        pairs[j] = pack<kType>(sum[at], sum[at + 1]);
      }
      exchange_pairs(pairs, lane);
      if (upper ? in.high() : in.low()) {
        store_global(reinterpret_cast<uint4*>(row + 2 * i), uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
      }
    }
  }
}

}  // namespace gradnorm::sm90
