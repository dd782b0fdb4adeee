// The compiled kernels of the CPU backend: one Kernel for each instruction set, in a translation unit of its own.
//
// A product of x [tokens, d_in] and dy [tokens, d_out] is cut in micro-tiles of `rows` x `columns` elements of
// dW [d_out, d_in], whose accumulators stay in registers over a block of tokens. Operands are packed first, so that a
// micro-tile reads memory in order: a panel is [tokens, rows] of dy or [tokens, columns] of x, as float32, the
// columns past the matrix' edge zero.
#pragma once

#include <cstdint>

namespace gradnorm::cpu {

// Floats that a vector of any of the instruction sets holds at most: the width of a partial sum of squares.
constexpr int kLanes = 16;

// Tokens of one block that belong to one segment of one sample.
struct SegmentPart {
  int32_t tokens;
  int32_t square;  // the partial sum that the finished gradient's squares are added to, or -1
  bool ends;       // the gradient is finished: it is added to the running sum, and the next part starts from zero
};

// One micro-tile over one block. `running`, `open` and `total` point at the tile's first element; rows are `stride` apart.
struct Tile {
  const float* dy_panel;  // [tokens, rows]
  const float* x_panel;   // [tokens, columns]
  const SegmentPart* parts;      // [part_count], covering the block's tokens; only the last may not end
  int part_count;
  int rows, columns;  // of the tile that lie inside the matrix
  int64_t stride;
  float* open;     // the unfinished gradient of the sample that crosses the block's ends
  bool open_in;    // it began in an earlier block
  float* running;  // the sum of the group's finished gradients
  bool fresh;      // there are none yet: `running` is not read
  bool keep;       // `running` is written back at the block's end
  float* total;    // where the group's sum goes at its end, or null
  bool total_set;  // it is the first group: `total` is not read
  int group_square;  // the partial sum that the squares of the group's sum are added to, or -1 if the group goes on
  float* squares;    // [partial sums][kLanes]
};

struct Kernel {
  int rows, columns;
  void (*tile)(const Tile&);
  // Inner products of `groups` matrices [rows, columns], `group_stride` floats apart, whose rows are `stride` apart: of the
  // pair a <= b kLanes partial sums at out[b (b + 1) / 2 + a]. Float32: for a unit's rows and columns at a time.
  void (*pairs)(const float* sums, int64_t group_stride, int groups, int64_t rows, int columns, int64_t stride,
                float (*out)[kLanes]);
  // total [rows, columns], its rows `total_stride` apart: the sum of such matrices, in their order.
  void (*add_up)(const float* sums, int64_t group_stride, int groups, int64_t rows, int columns, int64_t stride,
                 float* total, int64_t total_stride);
  // Packs tokens [first, last) of a matrix of `type` and `width` into panels [width / columns][tokens][columns] of
  // rows (dy) or columns (x); a panel begins `panel_stride` floats after the one before it. Token t is the matrix' row
  // rows[t], or row t where `rows` is null.
  void (*pack_dy)(const void* matrix, int64_t stride, int type, const int64_t* rows, int64_t width, int64_t first,
                  int64_t last, float* panels, int64_t panel_stride);
  void (*pack_x)(const void* matrix, int64_t stride, int type, const int64_t* rows, int64_t width, int64_t first,
                 int64_t last, float* panels, int64_t panel_stride);
};

extern const Kernel kernel_generic;
#if defined(__x86_64__)
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;
#endif

}  // namespace gradnorm::cpu
