// The order in which a block multiplies token blocks: one flat sequence over (work, run of rows, token block), where a
// work is a tile of the weight for one split of the items. Whoever loads runs ahead in it across the ends of samples,
// groups and works; what the end of a token block means travels with it.
#pragma once

#include "ptx_sm80.cuh"

namespace gradnorm {

// What follows a token block.
enum StepEnd : int {
  kSampleEnd = 1,  // the accumulator is complete: square it if the step has a target, add it to the group's sum
  kGroupEnd = 2,   // the group's sum is complete, as far as this split goes
  kWorkEnd = 4,    // the tile is complete, as far as this split goes
};

// Which tile and split a work is. Tiles are walked in bands of group_m rows of tiles, column by column within a band, so
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

// Rows [row, end) of one target and group. group -1: there is none.
struct Run {
  int row, end, target, group;
};

// Walks the token blocks of works first, first + stride, ... All fields are the same for every thread that uses one.
class Cursor {
 public:
  int row = 0;    // the first row of the token block
  int rows = 0;   // its rows, 1 to block_k; 0: the sequence has ended
  int ends = 0;   // StepEnd bits
  int work = 0;
  __device__ __forceinline__ int target() const { return now_.target; }
  __device__ __forceinline__ int group() const { return now_.group; }

  __device__ __forceinline__ Cursor(const WgradNorm& args, int tiles, int first, int stride, int block_k)
      : work(first - stride), items_(args), tiles_(tiles), stride_(stride), block_k_(block_k) {
    now_ = next_ = {0, 0, -1, -1};
    advance();
  }

  // To the next token block.
  __device__ __forceinline__ void advance() {
    row += block_k_;
    if (row >= now_.end) {
      now_ = next_;
      while (now_.group < 0) {
        work += stride_;
        if (work >= tiles_ * items_.splits) {
          rows = 0;
          return;
        }
        const int split = work / tiles_;
        item_ = load_global(items_.split_start + split);
        item_end_ = load_global(items_.split_start + split + 1);
        now_ = fetch();
      }
      next_ = fetch();
      row = now_.row;
    }
    rows = min(block_k_, now_.end - row);
    ends = 0;
    if (row + block_k_ >= now_.end) {
      if (next_.group != now_.group) ends |= kGroupEnd;
      if (next_.group != now_.group || next_.target != now_.target) ends |= kSampleEnd;
      if (next_.group < 0) ends |= kWorkEnd;
    }
  }

 private:
  // The next rows of the split that are not empty; neighbours that are not measured are one run.
  __device__ __forceinline__ Run fetch() {
    Run run{0, 0, -1, -1};
    for (; item_ < item_end_; ++item_) {
      const int start = load_global(items_.item_start + item_), end = load_global(items_.item_end + item_);
      if (start >= end) continue;
      const int target = load_global(items_.item_target + item_), group = load_global(items_.item_group + item_);
      if (run.group < 0) {
        run = {start, end, target, group};
      } else if (target < 0 && run.target < 0 && group == run.group && start == run.end) {
        run.end = end;
      } else {
        break;
      }
    }
    return run;
  }

  const WgradNorm& items_;
  Run now_, next_;
  int item_ = 0, item_end_ = 0;
  int tiles_, stride_, block_k_;
};

}  // namespace gradnorm
