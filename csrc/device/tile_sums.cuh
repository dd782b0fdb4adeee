// Where the sums of squares of a tile go: the warps of a block leave theirs in shared memory at a sample's or group's
// end, and one thread adds them up after a barrier that comes anyway. Nothing is added atomically.
#pragma once

#include "segments.cuh"

namespace gradnorm {

// The sum of a value over the lanes of a warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// The sum of the squares of n values, in four chains.
template <int n>
__device__ __forceinline__ float sum_of_squares(const float (&values)[n]) {
  float chains[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < n; ++i) chains[i % 4] += values[i] * values[i];
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// The same of a thread's part of a product of 16 rows and 8 columns, as multiply_add leaves it (two rows, 8 apart, and two
// neighbouring columns), where only `rows` rows and `columns` columns from its first element on are inside the matrix. What
// lies outside is left out by selection: a zero times an infinity of the other operand is NaN there.
__device__ __forceinline__ float sum_of_squares_inside(const float (&values)[4], int rows, int columns) {
  float squares[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    squares[i] = i / 2 * 8 < rows && i % 2 < columns ? values[i] * values[i] : 0.0f;
  }
  return (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

// The sum of `count` floats of shared memory, in order.
__device__ __forceinline__ float shared_sum(SharedAddress at, int count) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += load_shared_float(at + 4 * i);
  return sum;
}

// Writes two neighbouring elements of row `row` of a matrix [rows, columns], those that exist; `column` is even.
__device__ __forceinline__ void store_pair(float* matrix, int rows, int columns, int row, int column, float2 pair) {
  if (row >= rows || column >= columns) return;
  float* at = matrix + static_cast<int64_t>(row) * columns + column;
  if (columns % 2 == 0) {
    store_global(reinterpret_cast<float2*>(at), pair);
  } else {
    store_global(at, pair.x);
    if (column + 1 < columns) store_global(at + 1, pair.y);
  }
}

// The same of 2-byte elements, in fp32 until here.
template <int kType>
__device__ __forceinline__ void store_pair(uint16_t* matrix, int rows, int columns, int row, int column, float2 pair) {
  if (row >= rows || column >= columns) return;
  uint16_t* at = matrix + static_cast<int64_t>(row) * columns + column;
  const uint32_t packed = pack<kType>(pair.x, pair.y);
  if (columns % 2 == 0) {
    store_global(reinterpret_cast<uint32_t*>(at), packed);
  } else {
    store_global(at, static_cast<uint16_t>(packed));
    if (column + 1 < columns) store_global(at + 1, static_cast<uint16_t>(packed >> 16));
  }
}

// The two neighbouring elements that store_pair(float*, ...) wrote there; 0 where there is none.
__device__ __forceinline__ float2 load_pair(const float* matrix, int rows, int columns, int row, int column) {
  float2 pair = make_float2(0.0f, 0.0f);
  if (row >= rows || column >= columns) return pair;
  const float* at = matrix + static_cast<int64_t>(row) * columns + column;
  pair.x = load_global(at);
  if (column + 1 < columns) pair.y = load_global(at + 1);
  return pair;
}

// A pair of the group's sum goes to its place in `workspace`, which has the rows of the weight from `above` on; or, where that
// is negative, into weight_grad, which for several groups is kept in fp32 in `running` until the tile's last group.
template <int kType>
__device__ __forceinline__ void store_sum(const WgradNorm& args, int sum_index, int above, bool first, bool last, int row,
                                          int column, float2 pair) {
  if (above >= 0) {
    const int rows = args.d_out - above;
    float* sum = args.workspace + static_cast<int64_t>(sum_index) * rows * args.d_in;
    store_pair(sum, rows, args.d_in, row - above, column, pair);
    return;
  }
  if (!first) {
    const float2 before = load_pair(args.running, args.d_out, args.d_in, row, column);
    pair.x += before.x;
    pair.y += before.y;
  }
  if (last) {
    store_pair<kType>(static_cast<uint16_t*>(args.weight_grad), args.d_out, args.d_in, row, column, pair);
  } else {
    store_pair(args.running, args.d_out, args.d_in, row, column, pair);
  }
}

}  // namespace gradnorm
