// Segmented weight gradient for sm_80: norms at each sample's and group's end, and the sum, from one pass of
// tensor-core products over all tokens (launchers.h says what goes where).
//
// A block of 256 threads takes one tile of the weight after another, 128 rows by kColumns columns, and runs through the
// K tiles of all of them as one sequence (segments.cuh). K tiles of 32 tokens, four deep: cp.async brings rows of dy
// and x into shared memory as they lie, tokens by columns, while ldmatrix.trans and mma.sync work on earlier ones; a
// sample's end drains nothing. Rows behind a segment's end and columns behind the matrix are never read, but filled
// with zeros. Each of the 8 warps has 64 rows by a quarter of the columns: its accumulator is the sample at hand, next
// to it the group's sum.
#include <utility>

#include "device/launch.cuh"
#include "device/tile_sums.cuh"
#include "tiles.h"

namespace gradnorm {
namespace {

constexpr char kName[] = "wgrad_norm_sm80";
constexpr int kRows = 128;    // of a tile of the weight
constexpr int kBlockK = 32;   // tokens of a K tile
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStop = 1 << 8;  // among SegmentEnd bits: the sequence has ended

// A type of operands and a tile of tiles.h, with its shared memory.
template <int kType_, int kColumns_, int kTokens_, int kStages_>
struct Config {
  static constexpr int kType = kType_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kStages = kStages_;  // K tiles in shared memory
  static_assert(kTokens_ == kBlockK && kColumns % 64 == 0, "the layout of copies and fragments is for these");
  static constexpr int kWarpColumns = kColumns / 4;
  static constexpr int kPairs = kWarpColumns / 16;  // of 8 columns, as one ldmatrix loads them
  // Fragments of 16 tokens in registers: the next while one is multiplied. With 192 accumulators and sums a thread
  // there is room for one, and the other warp of a scheduler multiplies while this one loads.
  static constexpr int kBuffers = kColumns <= 128 ? 2 : 1;
  // K tiles whose notes are kept: a slow warp still reads one that others have left.
  static constexpr int kNotes = 2 * kStages;
  static constexpr int kDyBytes = kRows * 2;  // a token's
  static constexpr int kXBytes = kColumns * 2;
  static constexpr int kXAt = kBlockK * kDyBytes;  // in a stage, behind dy
  static constexpr int kStageBytes = kXAt + kBlockK * kXBytes;
  static constexpr int kNotesAt = kStages * kStageBytes;
  static constexpr int kSumsAt = kNotesAt + kNotes * 16;
  static constexpr int kSharedBytes = kSumsAt + 2 * 2 * kWarps * 4;
  static_assert(kSharedBytes <= 99 * 1024, "GPUs of 8.6 and 8.9 have no more per block");
};

// Byte offset of 8 columns (a chunk) of a token's row of kRowBytes. Chunks are permuted within a row, so that the same
// chunk of eight rows, which ldmatrix fetches together, lies in different banks.
template <int kRowBytes>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Brings K tiles into shared memory, in the order of the cursor. A thread copies chunks of one row: of each 64 columns
// one.
template <typename C>
class Loader {
 public:
  __device__ __forceinline__ Loader(const WgradNorm& args, const WorkGrid& grid, SharedAddress shared)
      : args_(args), grid_(grid), cursor_(args, grid, blockIdx.x, gridDim.x, kBlockK), shared_(shared) {}

  // Starts the copies of the next K tile, the step-th, and notes what it is. Every call ends a group of copies.
  __device__ __forceinline__ void issue(int step) {
    if (cursor_.rows > 0) {
      if (cursor_.work != work_) enter(cursor_.work);
      const int chunk = threadIdx.x % 8, row = threadIdx.x / 8;
      const SharedAddress stage = shared_ + step % C::kStages * C::kStageBytes;
      const int64_t token = row < cursor_.rows ? cursor_.row + row : -1;
      copy<kRows, C::kDyBytes>(stage, args_.dy, args_.dy_stride, token, args_.d_out, dy_column_, row, chunk);
      copy<C::kColumns, C::kXBytes>(stage + C::kXAt, args_.x, args_.x_stride, token, args_.d_in, x_column_, row, chunk);
    }
    if (threadIdx.x == 0) {
      const int ends = cursor_.rows > 0 ? cursor_.ends : kStop;
      store_shared_int4(shared_ + C::kNotesAt + step % C::kNotes * 16,
                        make_int4(ends, cursor_.sample(), cursor_.group(), cursor_.work));
    }
    if (cursor_.rows > 0) cursor_.advance();
    copy_commit();
  }

 private:
  // A new tile: its first columns of dy and x.
  __device__ __forceinline__ void enter(int work) {
    const TilePlace place = grid_.place_of(grid_.tile_of(work));
    work_ = work;
    dy_column_ = place.row * kRows;
    x_column_ = place.column * C::kColumns;
  }

  // This thread's chunks of a row of kCount columns, from `column` of `columns` on; zeros if token is -1.
  template <int kCount, int kRowBytes>
  __device__ __forceinline__ static void copy(SharedAddress to, const void* matrix, int64_t stride, int64_t token,
                                              int columns, int column, int row, int chunk) {
    const uint16_t* from = static_cast<const uint16_t*>(matrix) + token * stride;
#pragma unroll
    for (int i = 0; i < kCount / 64; ++i) {
      const int at = column + 8 * chunk + 64 * i;
      const int bytes = token >= 0 ? max(0, min(16, 2 * (columns - at))) : 0;
      copy_async(to + chunk_at<kRowBytes>(row, chunk + 8 * i), bytes > 0 ? from + at : matrix, bytes);
    }
  }

  const WgradNorm& args_;
  const WorkGrid& grid_;
  Cursor cursor_;
  SharedAddress shared_;
  int work_ = -1, dy_column_ = 0, x_column_ = 0;
};

// A warp's fragments of 16 tokens: dy for four times 16 rows of the weight, x for kPairs times 16 columns. `stage` is
// that of the first of the tokens; `dy_at` and `x_at` are the lane's places in it.
template <typename C>
struct Fragments {
  uint32_t dy[4][4];
  uint32_t x[C::kPairs][4];

  __device__ __forceinline__ void load_dy(SharedAddress stage, int tokens, int dy_at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) load_matrices_transposed(dy[i], stage + tokens * C::kDyBytes + (dy_at ^ i << 5));
  }

  __device__ __forceinline__ void load_x(SharedAddress stage, int tokens, const int (&x_at)[C::kPairs], int pair) {
    load_matrices_transposed(x[pair], stage + C::kXAt + tokens * C::kXBytes + x_at[pair]);
  }

  __device__ __forceinline__ void load(SharedAddress stage, int tokens, int dy_at, const int (&x_at)[C::kPairs]) {
    load_dy(stage, tokens, dy_at);
#pragma unroll
    for (int pair = 0; pair < C::kPairs; ++pair) load_x(stage, tokens, x_at, pair);
  }

  // Adds the products of dy and a pair of 8 columns to the sample's.
  __device__ __forceinline__ void multiply(float (&sample)[4][2 * C::kPairs][4], int pair) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        multiply_add<C::kType>(sample[i][2 * pair + j], dy[i], x[pair][2 * j], x[pair][2 * j + 1]);
      }
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(kThreads, 1) wgrad_norm_kernel(const __grid_constant__ WgradNorm args,
                                                                 const __grid_constant__ WorkGrid grid) {
  constexpr int kEights = C::kWarpColumns / 8;
  const SharedAddress shared = shared_base();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * C::kWarpColumns;
  // ldmatrix: lane 8 q + r names row r of matrix q. For dy the matrices are (tokens 0-7, rows 0-7), (0-7, 8-15),
  // (8-15, 0-7), (8-15, 8-15); for x (tokens 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
  const int q = lane / 8, r = lane % 8;
  const int dy_at = chunk_at<C::kDyBytes>(r + q / 2 * 8, warp_row / 8 + q % 2);
  int x_at[C::kPairs];
#pragma unroll
  for (int i = 0; i < C::kPairs; ++i) {
    x_at[i] = chunk_at<C::kXBytes>(r + q % 2 * 8, warp_column / 8 + q / 2 + 2 * i);
  }

  Loader<C> loader(args, grid, shared);
  float sample[4][kEights][4] = {};  // [16 rows][8 columns][as multiply_add has them]
  float sum[4][kEights][4] = {};
  Fragments<C> fragments[C::kBuffers];
  bool first_group = true;
  int due = 0;  // SegmentEnd bits of the step before: its warps' sums of squares lie in shared memory, to be added up

  // Add up what the warps left at the end of step - 1, a barrier ago.
  auto collect = [&](int step) {
    if (due == 0) return;
    const int4 note = load_shared_int4(shared + C::kNotesAt + (step - 1) % C::kNotes * 16);
    const SharedAddress sums = shared + C::kSumsAt + (step - 1) % 2 * (2 * kWarps * 4);
    const int64_t tile = grid.tile_of(note.w);
    if (threadIdx.x == 0 && (due & kSampleEnd) != 0 && note.y >= 0) {
      store_global(args.sample_sq + tile * args.samples + note.y, shared_sum(sums, kWarps));
    }
    if (threadIdx.x == 32 && (due & kGroupEnd) != 0 && grid.split_of(note.w) < 0) {
      store_global(args.group_sq + tile * args.groups + note.z, shared_sum(sums + kWarps * 4, kWarps));
    }
    due = 0;
  };

  for (int step = 0; step < C::kStages - 1; ++step) loader.issue(step);
  copy_wait<C::kStages - 2>();
  sync_block();
  int ends = load_shared_int4(shared + C::kNotesAt).x;
  if (C::kBuffers == 2 && (ends & kStop) == 0) fragments[0].load(shared, 0, dy_at, x_at);

  for (int step = 0; (ends & kStop) == 0; ++step) {
    const SharedAddress stage = shared + step % C::kStages * C::kStageBytes;
    const int next_ends = load_shared_int4(shared + C::kNotesAt + (step + 1) % C::kNotes * 16).x;
    loader.issue(step + C::kStages - 1);
    // The next K tile has arrived for everybody, and nobody reads this one any more.
    const auto leave = [&] {
      copy_wait<C::kStages - 2>();
      sync_block();
      collect(step);
    };
    if constexpr (C::kBuffers == 2) {
      fragments[1].load(stage, 16, dy_at, x_at);
#pragma unroll
      for (int pair = 0; pair < C::kPairs; ++pair) fragments[0].multiply(sample, pair);
      leave();
      if ((next_ends & kStop) == 0) {
        fragments[0].load(shared + (step + 1) % C::kStages * C::kStageBytes, 0, dy_at, x_at);
      }
#pragma unroll
      for (int pair = 0; pair < C::kPairs; ++pair) fragments[1].multiply(sample, pair);
    } else {
#pragma unroll
      for (int tokens = 0; tokens < kBlockK; tokens += 16) {
        fragments[0].load_dy(stage, tokens, dy_at);
#pragma unroll
        for (int pair = 0; pair < C::kPairs; ++pair) {
          fragments[0].load_x(stage, tokens, x_at, pair);
          fragments[0].multiply(sample, pair);
        }
      }
      leave();
    }

    if ((ends & kSampleEnd) != 0) {
      const SharedAddress sums = shared + C::kSumsAt + step % 2 * (2 * kWarps * 4) + warp * 4;
      const SharedAddress note_at = shared + C::kNotesAt + step % C::kNotes * 16;
      const int4 note = load_shared_int4(note_at);
      const TilePlace place = grid.place_of(grid.tile_of(note.w));
      const int row = place.row * kRows + warp_row + lane / 4;
      const int column = place.column * C::kColumns + warp_column + lane % 4 * 2;
      const int rows = args.d_out - row, columns = args.d_in - column;  // inside, from the first element on
      float squares = 0.0f, group_squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kEights; ++j) {
          squares += sum_of_squares_inside(sample[i][j], rows - i * 16, columns - j * 8);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            sum[i][j][k] += sample[i][j][k];
            sample[i][j][k] = 0.0f;
          }
        }
      }
      squares = warp_sum(squares);
      if (lane == 0) store_shared_float(sums, squares);
      if ((ends & kGroupEnd) != 0) {
        const int4 again = load_shared_int4(note_at);  // for 192 columns no register is free to keep it
        const int split = grid.split_of(again.w), above = split < 0 ? -1 : args.whole_rows * kRows;
        const bool last = (ends & kTileEnd) != 0, stored = split >= 0 || args.weight_grad != nullptr;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < kEights; ++j) {
            float(&pair)[4] = sum[i][j];
            group_squares += sum_of_squares_inside(pair, rows - i * 16, columns - j * 8);
            if (stored) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                store_sum<C::kType>(args, split + again.z, above, first_group, last, row + i * 16 + half * 8,
                                    column + j * 8, make_float2(pair[2 * half], pair[2 * half + 1]));
              }
            }
            pair[0] = pair[1] = pair[2] = pair[3] = 0.0f;
          }
        }
        group_squares = warp_sum(group_squares);
        if (lane == 0) store_shared_float(sums + kWarps * 4, group_squares);
        first_group = last;
      }
      due = ends;
    }
    ends = next_ends;
    if ((ends & kStop) != 0) {
      sync_block();
      collect(step + 1);
    }
  }
}

constexpr int kTiles = sizeof(kSm80WgradTiles) / sizeof(kSm80WgradTiles[0]);

// Launches the tile at this position of tiles.h if its columns are args.block_n. False if not.
template <int kType, size_t kIndex>
bool start_if(const WgradNorm& args, void* stream) {
  constexpr WgradTile kTile = kSm80WgradTiles[kIndex];
  static_assert(kTile.shared_sum == 0, "this kernel has all of the sum in registers");
  if (args.block_n != kTile.columns) return false;
  using C = Config<kType, kTile.columns, kTile.tokens, kTile.stages>;
  const int tile_rows = (args.d_out + kRows - 1) / kRows, tile_columns = (args.d_in + kTile.columns - 1) / kTile.columns;
  const WorkGrid grid(tile_rows, tile_columns, args.whole_rows, args.splits, args.group_m);
  const int64_t items = grid.items();
  const int64_t blocks = items < args.multiprocessors ? items : args.multiprocessors;
  launch(kName, wgrad_norm_kernel<C>, blocks, kThreads, C::kSharedBytes, stream, args, grid);
  return true;
}

template <int kType, size_t... kIndex>
bool start_tile(const WgradNorm& args, void* stream, std::index_sequence<kIndex...>) {
  return (start_if<kType, kIndex>(args, stream) || ...);
}

}  // namespace

int64_t wgrad_norm_sm80_rows(int d_in, int d_out, int block_n) {
  return static_cast<int64_t>((d_out + kRows - 1) / kRows) * ((d_in + block_n - 1) / block_n);
}

void wgrad_norm_sm80(const WgradNorm& args, void* stream) {
  if (args.cluster != 1) throw std::runtime_error(std::string(kName) + ": cluster must be 1: sm_80 has no clusters");
  if (const char* wrong = wrong_split(args, (args.d_out + kRows - 1) / kRows)) {
    throw std::runtime_error(std::string(kName) + ": " + wrong);
  }
  const auto tiles = std::make_index_sequence<kTiles>();
  const bool compiled = args.type == kBFloat16 ? start_tile<kBFloat16>(args, stream, tiles)
                                               : start_tile<kFloat16>(args, stream, tiles);
  if (!compiled) throw std::runtime_error(std::string(kName) + ": block_n must be " + columns_of(kSm80WgradTiles));
}

}  // namespace gradnorm
