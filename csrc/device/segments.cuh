// The order in which a block multiplies K tiles: one flat sequence over (work tile, segment, K tile). A work tile is a
// tile of the weight for one split of the segments. The loads run ahead across the ends of samples, groups and work
// tiles; what the end of a K tile means travels with it.
#pragma once

#include "ptx_sm80.cuh"

namespace gradnorm {

// What follows a K tile.
enum SegmentEnd : int {
  kSampleEnd = 1,  // the accumulator is complete: square it if the sample is measured, add it to the group's sum
  kGroupEnd = 2,   // the group's sum is complete, as far as this split goes
  kTileEnd = 4,    // the tile is complete, as far as this split goes
};

// The tile and the split of a work tile. Tiles are walked in bands of group_m rows of tiles, column by column within a band, so
// that blocks at work together share rows of dy and columns of x in the L2 cache. Splits are the slowest index.
struct TilePlace {
  int split, row, column;  // row of tiles (d_out), column of tiles (d_in)
};

__device__ __forceinline__ TilePlace place_of(int work, int tile_rows, int tile_columns, int group_m) {
  const int tiles = tile_rows * tile_columns;
  const int split = work / tiles, tile = work - split * tiles;
  const int band = tile / (group_m * tile_columns), within = tile - band * group_m * tile_columns;
  const int height = min(group_m, tile_rows - band * group_m);
  const int column = within / height;
  return {split, band * group_m + (within - column * height), column};
}

// Rows [row, end) of one sample and group. sample -1: not measured. group -1: there is no segment.
struct Segment {
  int row, end, sample, group;
};

// Walks the K tiles of the work tiles first, first + stride, ... All fields are the same in every thread.
class Cursor {
 public:
  int row = 0;    // the first row of the K tile
  int rows = 0;   // its rows, 1 to block_k; 0: the sequence has ended
  int ends = 0;   // SegmentEnd bits
  int work = 0;
  __device__ __forceinline__ int sample() const { return now_.sample; }
  __device__ __forceinline__ int group() const { return now_.group; }

  __device__ __forceinline__ Cursor(const WgradNorm& args, int tiles, int first, int stride, int block_k)
      : work(first - stride), args_(args), tiles_(tiles), stride_(stride), block_k_(block_k) {
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
        if (work >= tiles_ * args_.splits) {
          rows = 0;
          return;
        }
        const int split = work / tiles_;
        segment_ = load_global(args_.split_start + split);
        segment_end_ = load_global(args_.split_start + split + 1);
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
  Segment now_, next_;
  int segment_ = 0, segment_end_ = 0;
  int tiles_, stride_, block_k_;
};

}  // namespace gradnorm
