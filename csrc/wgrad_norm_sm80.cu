// Segmented weight gradient for sm_80: norms at each sample's and group's end, and the sum, from one pass of tensor-core
// products over all tokens (launchers.h says what goes where).
//
// A block of 256 threads takes one 128 x 128 tile of the weight after another and runs through the K tiles of all of them
// as one sequence (segments.cuh). K tiles of 32 tokens, four deep: cp.async brings rows of dy and x into shared
// memory as they lie, tokens by columns, while ldmatrix.trans and mma.sync work on earlier ones; a sample's end drains
// nothing. Rows behind a segment's end and columns behind the matrix are never read, but filled with zeros.
// Each of the 8 warps has 64 x 32 of the tile: its accumulator is the sample at hand, next to it the group's sum.
#include "device/launch.cuh"
#include "device/tile_sums.cuh"
#include "tiles.h"

namespace gradnorm {
namespace {

constexpr int kTile = kSm80WgradTiles[0].columns;    // rows and columns of a tile of the weight
constexpr int kBlockK = kSm80WgradTiles[0].tokens;   // tokens of a K tile
constexpr int kStages = kSm80WgradTiles[0].stages;   // K tiles in shared memory
static_assert(kTile == 128 && kBlockK == 32, "the layout of warps and fragments is for this tile");
constexpr int kNotes = 2 * kStages;  // K tiles whose notes are kept: a slow warp still reads one that others have left
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowBytes = kTile * 2;
constexpr int kOperandBytes = kBlockK * kRowBytes;
constexpr int kStageBytes = 2 * kOperandBytes;  // dy, then x
constexpr int kNotesAt = kStages * kStageBytes;
constexpr int kSumsAt = kNotesAt + kNotes * 16;
constexpr int kSharedBytes = kSumsAt + 2 * 2 * kWarps * 4;
constexpr int kStop = 1 << 8;  // among SegmentEnd bits: the sequence has ended

// Byte offset of 8 columns (a chunk) of a token's row in a stage. Chunks are permuted within a row, so that the same
// chunk of eight rows, which ldmatrix fetches together, lies in different banks.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// Brings K tiles into shared memory, in the order of the cursor.
class Loader {
 public:
  __device__ __forceinline__ Loader(const WgradNorm& args, SharedAddress shared, int tile_rows, int tile_columns)
      : args_(args),
        cursor_(args, tile_rows * tile_columns, blockIdx.x, gridDim.x, kBlockK),
        shared_(shared),
        tile_rows_(tile_rows),
        tile_columns_(tile_columns) {}

  // Starts the copies of the next K tile, the step-th, and notes what it is. Every call ends a group of copies.
  __device__ __forceinline__ void issue(int step) {
    const int chunk = threadIdx.x % 16, first_row = threadIdx.x / 16;
    if (cursor_.rows > 0) {
      if (cursor_.work != work_) enter(cursor_.work, chunk * 8);
      const SharedAddress stage = shared_ + step % kStages * kStageBytes;
#pragma unroll
      for (int row = first_row; row < first_row + kBlockK; row += 16) {
        const bool real = row < cursor_.rows;
        const int64_t token = cursor_.row + row;
        const SharedAddress to = stage + chunk_at(row, chunk);
        copy_async(to, real && dy_bytes_ > 0 ? dy_ + token * args_.dy_stride : dy_, real ? dy_bytes_ : 0);
        copy_async(to + kOperandBytes, real && x_bytes_ > 0 ? x_ + token * args_.x_stride : x_, real ? x_bytes_ : 0);
      }
    }
    if (threadIdx.x == 0) {
      const int ends = cursor_.rows > 0 ? cursor_.ends : kStop;
      store_shared_int4(shared_ + kNotesAt + step % kNotes * 16,
                        make_int4(ends, cursor_.sample(), cursor_.group(), cursor_.work));
    }
    if (cursor_.rows > 0) cursor_.advance();
    copy_commit();
  }

 private:
  // A new tile: this thread's columns of dy and x, and how many bytes of its chunk exist.
  __device__ __forceinline__ void enter(int work, int column) {
    const TilePlace place = place_of(work, tile_rows_, tile_columns_, args_.group_m);
    const int dy_column = place.row * kTile + column, x_column = place.column * kTile + column;
    work_ = work;
    dy_bytes_ = max(0, min(16, 2 * (args_.d_out - dy_column)));
    x_bytes_ = max(0, min(16, 2 * (args_.d_in - x_column)));
    dy_ = static_cast<const uint16_t*>(args_.dy) + (dy_bytes_ > 0 ? dy_column : 0);
    x_ = static_cast<const uint16_t*>(args_.x) + (x_bytes_ > 0 ? x_column : 0);
  }

  const WgradNorm& args_;
  Cursor cursor_;
  SharedAddress shared_;
  int tile_rows_, tile_columns_;
  int work_ = -1, dy_bytes_ = 0, x_bytes_ = 0;
  const uint16_t* dy_ = nullptr;
  const uint16_t* x_ = nullptr;
};

// A warp's fragments of 16 tokens: dy for four times 16 rows of the weight, x for four times 8 columns.
struct Fragments {
  uint32_t dy[4][4];
  uint32_t x[2][4];

  // `dy_at`, `x_at`: the lane's places in a stage, see fragment_places.
  __device__ __forceinline__ void load(SharedAddress stage, int tokens, int dy_at, int x_at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) load_matrices_transposed(dy[i], stage + tokens * kRowBytes + (dy_at ^ i << 5));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrices_transposed(x[i], stage + kOperandBytes + tokens * kRowBytes + (x_at ^ i << 5));
    }
  }
};

template <int kType>
__global__ void __launch_bounds__(kThreads, 1) wgrad_norm_kernel(const __grid_constant__ WgradNorm args) {
  const SharedAddress shared = shared_base();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  const int tile_rows = (args.d_out + kTile - 1) / kTile, tile_columns = (args.d_in + kTile - 1) / kTile;
  const int tiles = tile_rows * tile_columns;
  // ldmatrix: lane 8 q + r names row r of matrix q. For dy the matrices are (tokens 0-7, rows 0-7), (0-7, 8-15),
  // (8-15, 0-7), (8-15, 8-15); for x (tokens 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
  const int q = lane / 8, r = lane % 8;
  const int dy_at = chunk_at(r + q / 2 * 8, warp_row / 8 + q % 2);
  const int x_at = chunk_at(r + q % 2 * 8, warp_column / 8 + q / 2);

  Loader loader(args, shared, tile_rows, tile_columns);
  float sample[4][4][4] = {};  // [16 rows][8 columns][as multiply_add has them]
  float sum[4][4][4] = {};
  Fragments fragments[2];
  bool first_group = true;
  int due = 0;  // SegmentEnd bits of the step before: its warps' sums of squares lie in shared memory, to be added up

  // Add up what the warps left at the end of step - 1, a barrier ago.
  auto collect = [&](int step) {
    if (due == 0) return;
    const int4 note = load_shared_int4(shared + kNotesAt + (step - 1) % kNotes * 16);
    const SharedAddress sums = shared + kSumsAt + (step - 1) % 2 * (2 * kWarps * 4);
    const int64_t tile = note.w % tiles;
    if (threadIdx.x == 0 && (due & kSampleEnd) != 0 && note.y >= 0) {
      store_global(args.sample_sq + tile * args.samples + note.y, shared_sum(sums, kWarps));
    }
    if (threadIdx.x == 32 && (due & kGroupEnd) != 0 && args.workspace == nullptr) {
      store_global(args.group_sq + tile * args.groups + note.z, shared_sum(sums + kWarps * 4, kWarps));
    }
    due = 0;
  };

  for (int step = 0; step < kStages - 1; ++step) loader.issue(step);
  copy_wait<kStages - 2>();
  sync_block();
  int ends = load_shared_int4(shared + kNotesAt).x;
  if ((ends & kStop) == 0) fragments[0].load(shared, 0, dy_at, x_at);

  for (int step = 0; (ends & kStop) == 0; ++step) {
    const SharedAddress stage = shared + step % kStages * kStageBytes;
    const int next_ends = load_shared_int4(shared + kNotesAt + (step + 1) % kNotes * 16).x;
    loader.issue(step + kStages - 1);
    fragments[1].load(stage, 16, dy_at, x_at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1) {
        // The next K tile has arrived for everybody, and nobody reads this one any more.
        copy_wait<kStages - 2>();
        sync_block();
        collect(step);
        if ((next_ends & kStop) == 0) {
          fragments[0].load(shared + (step + 1) % kStages * kStageBytes, 0, dy_at, x_at);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t* x = fragments[half].x[j / 2] + j % 2 * 2;
          multiply_add<kType>(sample[i][j], fragments[half].dy[i], x[0], x[1]);
        }
      }
    }

    if ((ends & kSampleEnd) != 0) {
      const SharedAddress sums = shared + kSumsAt + step % 2 * (2 * kWarps * 4) + warp * 4;
      const int4 note = load_shared_int4(shared + kNotesAt + step % kNotes * 16);
      const TilePlace place = place_of(note.w, tile_rows, tile_columns, args.group_m);
      const int row = place.row * kTile + warp_row + lane / 4;
      const int column = place.column * kTile + warp_column + lane % 4 * 2;
      const int rows = args.d_out - row, columns = args.d_in - column;  // inside, from the first element on
      float squares = 0.0f, group_squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
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
        const bool last = (ends & kTileEnd) != 0, stored = args.workspace != nullptr || args.weight_grad != nullptr;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float(&pair)[4] = sum[i][j];
            group_squares += sum_of_squares_inside(pair, rows - i * 16, columns - j * 8);
            if (stored) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                store_sum<kType>(args, place.split + note.z, first_group, last, row + i * 16 + half * 8, column + j * 8,
                                 make_float2(pair[2 * half], pair[2 * half + 1]));
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

}  // namespace

int64_t wgrad_norm_sm80_rows(int d_in, int d_out, int) {
  return static_cast<int64_t>((d_out + kTile - 1) / kTile) * ((d_in + kTile - 1) / kTile);
}

void wgrad_norm_sm80(const WgradNorm& args, void* stream) {
  const int64_t work_tiles = wgrad_norm_sm80_rows(args.d_in, args.d_out, kTile) * args.splits;
  const int64_t blocks = work_tiles < args.multiprocessors ? work_tiles : args.multiprocessors;
  auto* kernel = args.type == kBFloat16 ? wgrad_norm_kernel<kBFloat16> : wgrad_norm_kernel<kFloat16>;
  launch("wgrad_norm_sm80", kernel, blocks, kThreads, kSharedBytes, stream, args);
}

}  // namespace gradnorm
