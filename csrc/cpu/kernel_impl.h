// The body of every translation unit kernel_<isa>.cpp, written once with the compiler's own vectors (GCC and Clang).
//
// The including file defines VECTOR_BYTES, TILE_ROWS, TILE_VECTORS (columns, in vectors) and RUNNING_IN_REGISTERS:
// with 32 wide registers the running sum lives beside the accumulators, and the end of a sample touches no memory but
// one partial sum of squares; with 16 it lives in memory.
//
// Everything here is in an unnamed namespace, and nothing is taken from the standard library: an inline function
// compiled for a newer instruction set must not be the one that the linker keeps for all.
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../launchers.h"
#include "kernel.h"

namespace {

using gradnorm::cpu::kLanes;
using gradnorm::cpu::SegmentPart;
using gradnorm::cpu::Tile;

using Vector = float __attribute__((vector_size(VECTOR_BYTES)));
using Unaligned = float __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
using Mask = int32_t __attribute__((vector_size(VECTOR_BYTES)));

constexpr int kWidth = VECTOR_BYTES / 4;
constexpr int kRows = TILE_ROWS;
constexpr int kVectors = TILE_VECTORS;
constexpr int kColumns = kVectors * kWidth;

using Registers = Vector[kRows][kVectors];

inline Vector load(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }
inline void store(float* at, Vector value) { *reinterpret_cast<Unaligned*>(at) = value; }

// operation(i, j) for every register of a tile, unrolled.
template <typename Operation>
inline __attribute__((always_inline)) void each(Operation operation) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) operation(i, j);
  }
}

inline __attribute__((always_inline)) void add_squares(const Registers& value, float* partial) {
  Vector sums[4] = {};
  each([&](int i, int j) { sums[(i * kVectors + j) % 4] += value[i][j] * value[i][j]; });
  store(partial, load(partial) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// acc += the product of `tokens` rows of the panels, which are moved on.
inline __attribute__((always_inline)) void multiply(Registers& acc, const float*& dy, const float*& x, int tokens) {
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
    Vector columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) columns[j] = *reinterpret_cast<const Vector*>(x + j * kWidth);
    each([&](int i, int j) { acc[i][j] += dy[i] * columns[j]; });
    dy += kRows;
    x += kColumns;
  }
}

// The squares of a group's sum, and its way into the total.
inline __attribute__((always_inline)) void end_group(const Tile& tile, const Registers& sum) {
  add_squares(sum, tile.squares + tile.group_square * kLanes);
  if (!tile.total) return;
  each([&](int i, int j) {
    float* at = tile.total + i * tile.stride + j * kWidth;
    store(at, tile.total_set ? sum[i][j] : load(at) + sum[i][j]);
  });
}

// `edge`: part of the tile lies outside the matrix. Its accumulators there are products with the panels' zeros, which
// are NaN where the other factor is not finite: they are cleared before anything is made of them.
template <bool edge>
inline __attribute__((always_inline)) void run_tile(const Tile& tile) {
  const int64_t stride = tile.stride;
  const float* dy = tile.dy_panel;
  const float* x = tile.x_panel;
  Mask inside[kVectors];
  if (edge) {
    for (int j = 0; j < kVectors; ++j) {
      for (int lane = 0; lane < kWidth; ++lane) inside[j][lane] = j * kWidth + lane < tile.columns ? -1 : 0;
    }
  }
  // The rows below are the next tile's.
  const bool touched = tile.parts[0].ends;
  for (int i = 0; !edge && i < kRows; ++i) {
    for (int j = 0; j < kColumns; j += 16) {
      const int64_t next = (kRows + i) * stride + j;
      if (tile.open_in) __builtin_prefetch(tile.open + next, 1);
      if (touched && (!tile.fresh || tile.keep)) __builtin_prefetch(tile.running + next, 1);
      if (tile.group_square >= 0 && tile.total) __builtin_prefetch(tile.total + next, 1);
    }
  }
  Registers acc = {};
#if RUNNING_IN_REGISTERS
  Registers sum = {};
  if (!tile.fresh && tile.parts[0].ends) each([&](int i, int j) { sum[i][j] = load(tile.running + i * stride + j * kWidth); });
#endif
  bool fresh = tile.fresh, open = tile.open_in;
  for (int s = 0; s < tile.part_count; ++s) {
    const SegmentPart& part = tile.parts[s];
    multiply(acc, dy, x, part.tokens);
    if (edge) {
      each([&](int i, int j) {
        acc[i][j] = i < tile.rows ? reinterpret_cast<Vector>(reinterpret_cast<Mask>(acc[i][j]) & inside[j]) : Vector{};
      });
    }
    if (open) {
      each([&](int i, int j) { acc[i][j] += load(tile.open + i * stride + j * kWidth); });
      open = false;
    }
    if (!part.ends) {
      each([&](int i, int j) { store(tile.open + i * stride + j * kWidth, acc[i][j]); });
      break;
    }
    if (part.square >= 0) add_squares(acc, tile.squares + part.square * kLanes);
#if RUNNING_IN_REGISTERS
    each([&](int i, int j) { sum[i][j] += acc[i][j]; });
#else
    if (tile.group_square >= 0 && s + 1 == tile.part_count) {  // the group's end: its sum is made in the accumulators
      if (!fresh) each([&](int i, int j) { acc[i][j] += load(tile.running + i * stride + j * kWidth); });
      if (tile.keep) each([&](int i, int j) { store(tile.running + i * stride + j * kWidth, acc[i][j]); });
      end_group(tile, acc);
      return;
    }
    if (fresh) {
      each([&](int i, int j) { store(tile.running + i * stride + j * kWidth, acc[i][j]); });
    } else {
      each([&](int i, int j) {
        float* at = tile.running + i * stride + j * kWidth;
        store(at, load(at) + acc[i][j]);
      });
    }
#endif
    fresh = false;
    each([&](int i, int j) { acc[i][j] = Vector{}; });
  }
#if RUNNING_IN_REGISTERS
  (void)fresh;
  if (!tile.parts[0].ends) return;
  if (tile.group_square >= 0) end_group(tile, sum);
  if (tile.keep) each([&](int i, int j) { store(tile.running + i * stride + j * kWidth, sum[i][j]); });
#endif
}

// A tile across the matrix' edge, on copies that are as large as a tile.
void run_edge(const Tile& tile) {
  alignas(64) float open[kRows * kColumns] = {}, running[kRows * kColumns] = {}, total[kRows * kColumns] = {};
  float* const copies[3] = {open, running, total};
  float* const places[3] = {tile.open, tile.running, tile.total};
  const bool read[3] = {tile.open_in, !tile.fresh, !tile.total_set};
  const size_t bytes = static_cast<size_t>(tile.columns) * sizeof(float);
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; places[k] && read[k] && i < tile.rows; ++i) {
      std::memcpy(copies[k] + i * kColumns, places[k] + i * tile.stride, bytes);
    }
  }
  Tile inner = tile;
  inner.stride = kColumns;
  inner.open = open;
  inner.running = running;
  inner.total = tile.total ? total : nullptr;
  run_tile<true>(inner);
  const bool touched = tile.parts[0].ends;
  const bool written[3] = {!tile.parts[tile.part_count - 1].ends, touched && tile.keep, touched && tile.group_square >= 0};
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; places[k] && written[k] && i < tile.rows; ++i) {
      std::memcpy(places[k] + i * tile.stride, copies[k] + i * kColumns, bytes);
    }
  }
}

void tile(const Tile& tile) {
  if (tile.rows < kRows || tile.columns < kColumns) return run_edge(tile);
  run_tile<false>(tile);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Half precision to float32, exact, also where the processor flushes subnormals to zero.
inline float from_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &subnormal, sizeof bits);
  if (magnitude >= 0x400u) bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  return from_bits(bits | sign);
}

// `count` elements of a row as float32.
inline void widen(const uint16_t* from, int type, int count, float* to) {
  int c = 0;
  if (type == gradnorm::kBFloat16) {
    for (; c < count; ++c) to[c] = from_bits(static_cast<uint32_t>(from[c]) << 16);
    return;
  }
#if defined(__F16C__)
  for (; c + 8 <= count; c += 8) {
    _mm256_storeu_ps(to + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c))));
  }
#endif
  for (; c < count; ++c) to[c] = from_half(from[c]);
}

// Panels of `kPanel` columns: eight tokens at a time, so that a panel's lines are written whole and few rows are read at
// once; half-precision rows are widened in pieces of a multiple of the panels' width.
template <int kPanel>
void pack(const void* matrix, int64_t stride, int type, const int64_t* row_of, int64_t width, int64_t first, int64_t last,
          float* panels, int64_t panel_stride) {
  constexpr int kTokens = 8, kPiece = 32 * kPanel;
  alignas(64) float wide[kTokens][kPiece];
  for (int64_t t = first; t < last; t += kTokens) {
    const int tokens = last - t < kTokens ? static_cast<int>(last - t) : kTokens;
    for (int64_t column = 0; column < width; column += kPiece) {
      const int piece = width - column < kPiece ? static_cast<int>(width - column) : kPiece;
      const float* rows[kTokens];
      for (int k = 0; k < tokens; ++k) {
        const int64_t at = (row_of ? row_of[t + k] : t + k) * stride + column;
        if (type == gradnorm::kFloat32) {
          rows[k] = static_cast<const float*>(matrix) + at;
        } else {
          widen(static_cast<const uint16_t*>(matrix) + at, type, piece, wide[k]);
          rows[k] = wide[k];
        }
      }
      float* to = panels + column / kPanel * panel_stride + t * kPanel;
      int c = 0;
      for (; c + kPanel <= piece; c += kPanel, to += panel_stride) {
        for (int k = 0; k < tokens; ++k) std::memcpy(to + k * kPanel, rows[k] + c, kPanel * sizeof(float));
      }
      if (c < piece) {
        for (int k = 0; k < tokens; ++k) {
          std::memset(to + k * kPanel, 0, kPanel * sizeof(float));
          std::memcpy(to + k * kPanel, rows[k] + c, (piece - c) * sizeof(float));
        }
      }
    }
  }
}

// Two matrices with four others at a time: eight sums and six loads in registers.
void pairs(const float* sums, int64_t group_stride, int groups, int64_t rows, int columns, int64_t stride,
           float (*out)[kLanes]) {
  constexpr int kA = 2, kB = 4;
  for (int a0 = 0; a0 < groups; a0 += kA) {
    for (int b0 = a0; b0 < groups; b0 += kB) {
      const float* a[kA];
      const float* b[kB];
      for (int i = 0; i < kA; ++i) a[i] = sums + (a0 + i < groups ? a0 + i : groups - 1) * group_stride;
      for (int j = 0; j < kB; ++j) b[j] = sums + (b0 + j < groups ? b0 + j : groups - 1) * group_stride;
      Vector acc[kA][kB] = {};
      float rest[kA][kB] = {};
      for (int64_t row = 0; row < rows; ++row) {
        int64_t at = row * stride;
        const int64_t end = at + columns;
        for (; at + kWidth <= end; at += kWidth) {
          Vector right[kB];
#pragma GCC unroll 4
          for (int j = 0; j < kB; ++j) right[j] = load(b[j] + at);
#pragma GCC unroll 2
          for (int i = 0; i < kA; ++i) {
            const Vector left = load(a[i] + at);
#pragma GCC unroll 4
            for (int j = 0; j < kB; ++j) acc[i][j] += left * right[j];
          }
        }
        for (; at < end; ++at) {
          for (int i = 0; i < kA; ++i) {
            for (int j = 0; j < kB; ++j) rest[i][j] += a[i][at] * b[j][at];
          }
        }
      }
      for (int i = 0; i < kA; ++i) {
        for (int j = 0; j < kB; ++j) {
          const int64_t x = a0 + i, y = b0 + j;
          if (x > y || y >= groups) continue;
          float* const lanes = out[y * (y + 1) / 2 + x];
          std::memset(lanes, 0, kLanes * sizeof(float));
          store(lanes, acc[i][j]);
          lanes[0] += rest[i][j];
        }
      }
    }
  }
}

void add_up(const float* sums, int64_t group_stride, int groups, int64_t rows, int columns, int64_t stride, float* total,
            int64_t total_stride) {
  for (int64_t row = 0; row < rows; ++row, sums += stride, total += total_stride) {
    int c = 0;
    for (; c + kWidth <= columns; c += kWidth) {
      Vector sum = load(sums + c);
      for (int group = 1; group < groups; ++group) sum += load(sums + group * group_stride + c);
      store(total + c, sum);
    }
    for (; c < columns; ++c) {
      float sum = sums[c];
      for (int group = 1; group < groups; ++group) sum += sums[group * group_stride + c];
      total[c] = sum;
    }
  }
}

constexpr gradnorm::cpu::Kernel kKernel = {kRows, kColumns, &tile, &pairs, &add_up, &pack<kRows>, &pack<kColumns>};

}  // namespace
