// Norms and inner products of gradients from pairs of tokens, <G_i, G_j> = sum over t in i, s in j of
// (x_t . x_s)(dy_t . dy_s), on the tensor cores of sm_80 and newer. No matrix of tokens by tokens is stored.
//
// Tokens are taken in the order of their samples, through a table of rows, in tiles of 64. A block of 128 threads makes
// two products for a pair of tiles, x x^T over d_in and dy dy^T over d_out, with one pipeline of cp.async over both, and
// sums their elementwise product by samples. Only pairs on and right of the diagonal are made. A tile and a sample that
// meet give one partial sum. Its number is the tile's plus the sample's rank, unique because both ascend.
#include "device/launch.cuh"
#include "device/ptx_sm80.cuh"

namespace gradnorm {
namespace {

constexpr int kTile = kGramTile;  // tokens
constexpr int kBlockK = 64;       // elements of d_in or d_out in a step
constexpr int kStages = 4;
constexpr int kThreads = 128;
constexpr int kRowBytes = kBlockK * 2;
constexpr int kOperandBytes = kTile * kRowBytes;
constexpr int kStageBytes = 2 * kOperandBytes;  // the rows' tokens, then the columns'
constexpr int kRanksAt = kStages * kStageBytes;
constexpr int kSharedBytes = kRanksAt + 2 * kTile * 4;
constexpr int kPitch = kTile + 1;  // floats from one row of the terms to the next, in the memory of the stages

static_assert(kTile * kPitch * 4 <= kRanksAt, "the terms lie where the stages were");

__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// A thread's share of bringing tokens in: 8 chunks of 8 columns a step, half of a token's row of either operand.
class Loader {
 public:
  __device__ __forceinline__ Loader(const Gram& args, int tokens, SharedAddress shared, int row_tile, int column_tile)
      : args_(args), shared_(shared) {
    const int row = row_tile * kTile + threadIdx.x / 2, column = column_tile * kTile + threadIdx.x / 2;
    row_[0] = row < tokens ? load_global(args.token_row + row) : -1;
    row_[1] = column < tokens ? load_global(args.token_row + column) : -1;
  }

  // Starts the copies of a step: of dy from step x_steps on. Every call ends a group of copies.
  __device__ __forceinline__ void issue(int step, int x_steps, int steps) {
    if (step < steps) {
      const bool second = step >= x_steps;
      const auto* base = static_cast<const uint16_t*>(second ? args_.dy : args_.x);
      const int64_t stride = second ? args_.dy_stride : args_.x_stride;
      const int width = second ? args_.d_out : args_.d_in, from = (second ? step - x_steps : step) * kBlockK;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int chunk = i * 2 + threadIdx.x % 2, column = from + chunk * 8;
          const int bytes = row_[side] >= 0 ? max(0, min(16, 2 * (width - column))) : 0;
          const SharedAddress to =
              shared_ + step % kStages * kStageBytes + side * kOperandBytes + chunk_at(threadIdx.x / 2, chunk);
          copy_async(to, bytes > 0 ? base + row_[side] * stride + column : base, bytes);
        }
      }
    }
    copy_commit();
  }

 private:
  const Gram& args_;
  SharedAddress shared_;
  int64_t row_[2];
};

// products [2][4] (of 16 x 8, for a warp's 32 x 32) += rows columns^T over the 64 elements of a stage.
template <int kType>
__device__ __forceinline__ void multiply(float (&products)[2][4][4], SharedAddress stage, int rows_at, int columns_at) {
#pragma unroll
  for (int k = 0; k < kBlockK / 16; ++k) {
    uint32_t rows[2][4], columns[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrices(rows[i], stage + i * 16 * kRowBytes + (rows_at ^ k << 5));
      load_matrices(columns[i], stage + kOperandBytes + i * 16 * kRowBytes + (columns_at ^ k << 5));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply_add<kType>(products[i][j], rows[i], columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

__device__ __forceinline__ int rank_at(SharedAddress ranks, int i) { return load_shared_int(ranks + 4 * i); }

__device__ __forceinline__ SharedAddress term_at(SharedAddress shared, int row, int column) {
  return shared + (row * kPitch + column) * 4;
}

// Sums the terms of a pair of tiles by samples and writes one partial sum per pair of (tile, sample), or, where only samples
// with themselves count, per sample of the row tile. Terms are selected, not multiplied by zero: a NaN stays in
// its sample.
__device__ __forceinline__ void write_sums(const Gram& args, SharedAddress shared, int row_tile, int column_tile) {
  const SharedAddress row_ranks = shared + kRanksAt, column_ranks = row_ranks + kTile * 4;
  if (threadIdx.x < kTile) {
    // Each column: the sums over the rows of a sample, to where the sample's first row was.
    const int column = threadIdx.x, own = rank_at(column_ranks, column);
    float sum = 0.0f;
    int first = 0, rank = rank_at(row_ranks, 0);
    for (int row = 0; row < kTile; ++row) {
      const int next = rank_at(row_ranks, row);
      if (next != rank) {
        if (args.pairwise) {
          store_shared_float(term_at(shared, first, column), sum);
        } else if (rank == own) {
          break;
        }
        sum = 0.0f;
        first = row;
        rank = next;
      }
      sum += load_shared_float(term_at(shared, row, column));
    }
    store_shared_float(term_at(shared, args.pairwise ? first : 0, column), sum);
  }
  sync_block();
  const int column = threadIdx.x % kTile, rank = rank_at(column_ranks, column);
  if (rank < 0 || (column > 0 && rank_at(column_ranks, column - 1) == rank)) return;
  int end = column + 1;
  while (end < kTile && rank_at(column_ranks, end) == rank) ++end;
  if (args.pairwise) {
    for (int row = threadIdx.x / kTile; row < kTile; row += kThreads / kTile) {
      const int row_rank = rank_at(row_ranks, row);
      if (row_rank < 0 || (row > 0 && rank_at(row_ranks, row - 1) == row_rank)) continue;
      float sum = 0.0f;
      for (int i = column; i < end; ++i) sum += load_shared_float(term_at(shared, row, i));
      const int64_t partial_row = row_tile + row_rank;
      store_global(args.partial + partial_row * args.partials + column_tile + rank, sum);
    }
  } else if (threadIdx.x < kTile) {
    bool meets = false;
    for (int row = 0; row < kTile; ++row) meets |= rank_at(row_ranks, row) == rank;
    if (!meets) return;
    float sum = 0.0f;
    for (int i = column; i < end; ++i) sum += load_shared_float(term_at(shared, 0, i));
    store_global(args.partial + static_cast<int64_t>(row_tile + rank) * args.reach + (column_tile - row_tile), sum);
  }
}

template <int kType>
__global__ void __launch_bounds__(kThreads, 2) gram_kernel(const __grid_constant__ Gram args) {
  const int tokens = load_global(args.count), tiles = (tokens + kTile - 1) / kTile;
  const int row_tile = blockIdx.x / args.reach, column_tile = row_tile + blockIdx.x % args.reach;
  if (column_tile >= tiles) return;
  // Ranks ascend: where the rows' last one is below the columns' first one, nothing meets.
  const int last_row = min(tokens, (row_tile + 1) * kTile) - 1;
  if (!args.pairwise && load_global(args.token_rank + last_row) < load_global(args.token_rank + column_tile * kTile)) return;

  const SharedAddress shared = shared_base();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  // ldmatrix: lane 8 q + r names row r of matrix q: for the rows' tokens (tokens 0-7, elements 0-7), (8-15, 0-7),
  // (0-7, 8-15), (8-15, 8-15); for the columns' (0-7, 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
  const int q = lane / 8, r = lane % 8;
  const int rows_at = chunk_at(warp_row + r + q % 2 * 8, q / 2);
  const int columns_at = chunk_at(warp_column + r + q / 2 * 8, q % 2);
  const int x_steps = (args.d_in + kBlockK - 1) / kBlockK, steps = x_steps + (args.d_out + kBlockK - 1) / kBlockK;

  {
    const int token = (threadIdx.x < kTile ? row_tile * kTile : column_tile * kTile) + threadIdx.x % kTile;
    const int rank = token < tokens ? load_global(args.token_rank + token) : -1;
    store_shared_int(shared + kRanksAt + threadIdx.x * 4, rank);
  }
  Loader loader(args, tokens, shared, row_tile, column_tile);
  float x_products[2][4][4] = {}, dy_products[2][4][4] = {};
  for (int step = 0; step < kStages - 1; ++step) loader.issue(step, x_steps, steps);
  for (int step = 0; step < steps; ++step) {
    // The step has arrived for everybody, and nobody reads the one before it any more.
    copy_wait<kStages - 2>();
    sync_block();
    loader.issue(step + kStages - 1, x_steps, steps);
    const SharedAddress stage = shared + step % kStages * kStageBytes;
    if (step < x_steps) {
      multiply<kType>(x_products, stage, rows_at, columns_at);
    } else {
      multiply<kType>(dy_products, stage, rows_at, columns_at);
    }
  }

  // The terms take the place of the stages, once nobody reads these any more.
  sync_block();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = warp_row + i * 16 + k / 2 * 8 + lane / 4, column = warp_column + j * 8 + lane % 4 * 2 + k % 2;
        store_shared_float(term_at(shared, row, column), x_products[i][j][k] * dy_products[i][j][k]);
      }
    }
  }
  sync_block();
  write_sums(args, shared, row_tile, column_tile);
}

}  // namespace

void gram_sm80(const Gram& args, void* stream) {
  const int64_t tiles = (args.tokens + kTile - 1) / kTile;
  auto* kernel = args.type == kBFloat16 ? gram_kernel<kBFloat16> : gram_kernel<kFloat16>;
  launch("gram_sm80", kernel, tiles * args.reach, kThreads, kSharedBytes, stream, args);
}

}  // namespace gradnorm
