// The order in which a block multiplies K tiles: one flat sequence over (work item, segment, K tile). A work item is a
// tile of the weight for all segments or for one split of them. The loads run ahead across the ends of samples, groups
// and work items; what the end of a K tile means travels with it.
#pragma once

#include "ptx_sm80.cuh"

namespace gradnorm {

// What follows a K tile.
enum SegmentEnd : int {
  kSampleEnd = 1,  // the accumulator is complete: square it if the sample is measured, add it to the group's sum
  kGroupEnd = 2,   // the group's sum is complete, as far as this split goes
  kTileEnd = 4,    // the tile is complete, as far as this split goes
};

// Where a tile is in the weight: its row of tiles (d_out) and its column of tiles (d_in).
struct TilePlace {
  int row, column;
};

// The work items of a launch: first the tiles of the upper `whole_rows` rows of tiles, each for all segments; then those
// of the other rows, split by split. Tiles are walked in bands of group_m rows of tiles, column by column within a band,
// so that blocks at work together share rows of dy and columns of x in the L2 cache.
// A parameter of the kernels: what they compute with is read from constant memory and takes no registers.
struct WorkGrid {
  int rows, columns, whole_rows, splits, group_m;
  int whole_tiles, split_tiles;

  WorkGrid(int rows, int columns, int whole_rows, int splits, int group_m)
      : rows(rows), columns(columns), whole_rows(whole_rows), splits(splits), group_m(group_m),
        whole_tiles(whole_rows * columns), split_tiles((rows - whole_rows) * columns) {}

  __host__ __device__ __forceinline__ int64_t items() const {
    return whole_tiles + static_cast<int64_t>(split_tiles) * splits;
  }

  // The split of an item, or -1: all segments.
  __device__ __forceinline__ int split_of(int item) const {
    return item < whole_tiles ? -1 : (item - whole_tiles) / split_tiles;
  }

  __device__ __forceinline__ int tile_of(int item) const {
    return item < whole_tiles ? item : whole_tiles + (item - whole_tiles) % split_tiles;
  }

  __device__ __forceinline__ TilePlace place_of(int tile) const {
    const bool whole = tile < whole_tiles;
    const int first_row = whole ? 0 : whole_rows, height = whole ? whole_rows : rows - whole_rows;
    tile -= first_row * columns;
    const int band = tile / (group_m * columns), within = tile - band * group_m * columns;
    const int band_height = min(group_m, height - band * group_m);
    const int column = within / band_height;
    return {first_row + band * group_m + (within - column * band_height), column};
  }

  // The segments of a split, or all of them (-1): from first_segment on, before segment_end.
  __device__ __forceinline__ int first_segment(const int32_t* split_start, int split) const {
    return load_global(split_start + max(split, 0));
  }
  __device__ __forceinline__ int segment_end(const int32_t* split_start, int split) const {
    return load_global(split_start + (split < 0 ? splits : split + 1));
  }
};

// What is wrong with a launch's split of `tile_rows` rows of tiles, or null.
inline const char* wrong_split(const WgradNorm& args, int64_t tile_rows) {
  if (args.whole_rows < 0 || args.whole_rows > tile_rows) return "whole_rows must be 0 to the number of rows of tiles";
  if ((args.whole_rows < tile_rows) != (args.workspace != nullptr)) {
    return "workspace must be given exactly where some rows of tiles are not whole";
  }
  if ((args.whole_rows > 0) != (args.group_sq != nullptr)) {
    return "group_sq must be given exactly where some rows of tiles are whole";
  }
  return nullptr;
}

// Rows [row, end) of one sample and group. sample -1: not measured. group -1: there is no segment.
struct Segment {
  int row, end, sample, group;
};

// Walks the K tiles of the work items first, first + stride, ... All fields are the same in every thread.
class Cursor {
 public:
  int row = 0;    // the first row of the K tile
  int rows = 0;   // its rows, 1 to block_k; 0: the sequence has ended
  int ends = 0;   // SegmentEnd bits
  int work = 0;
  __device__ __forceinline__ int sample() const { return now_.sample; }
  __device__ __forceinline__ int group() const { return now_.group; }

  __device__ __forceinline__ Cursor(const WgradNorm& args, const WorkGrid& grid, int first, int stride, int block_k)
      : work(first - stride), args_(args), grid_(grid), stride_(stride), block_k_(block_k) {
    now_ = next_ = {0, 0, -1, -1};
    advance();
  }

  // To the next K tile.
  __device__ __forceinline__ void advance() {
    row += block_k_;
    if (row >= now_.end) {
      now_ = next_;
      while (now_.group < 0) {
        work += stride_;
        if (work >= static_cast<int>(grid_.items())) {
          rows = 0;
          return;
        }
        const int split = grid_.split_of(work);
        segment_ = grid_.first_segment(args_.split_start, split);
        segment_end_ = grid_.segment_end(args_.split_start, split);
        now_ = fetch();
      }
      next_ = fetch();
      row = now_.row;
    }
    rows = min(block_k_, now_.end - row);
    ends = 0;
    if (row + block_k_ >= now_.end) {
      if (next_.group != now_.group) ends |= kGroupEnd;
      if (next_.group != now_.group || next_.sample != now_.sample) ends |= kSampleEnd;
      if (next_.group < 0) ends |= kTileEnd;
    }
  }

 private:
  // The next rows of the split that are not empty; neighbours that are not measured become one segment.
  __device__ __forceinline__ Segment fetch() {
    Segment segment{0, 0, -1, -1};
    for (; segment_ < segment_end_; ++segment_) {
      const int start = load_global(args_.segment_start + segment_), end = load_global(args_.segment_end + segment_);
      if (start >= end) continue;
      const int sample = load_global(args_.segment_sample + segment_), group = load_global(args_.segment_group + segment_);
      if (segment.group < 0) {
        segment = {start, end, sample, group};
      } else if (sample < 0 && segment.sample < 0 && group == segment.group && start == segment.end) {
        segment.end = end;
      } else {
        break;
      }
    }
    return segment;
  }

  const WgradNorm& args_;
  const WorkGrid& grid_;
  Segment now_, next_;
  int segment_ = 0, segment_end_ = 0;
  int stride_, block_k_;
};

}  // namespace gradnorm
