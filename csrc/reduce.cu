// The second kernels: partial sums of tiles are added in fp64, and parts of one gradient in fp32 before they are squared
// (the split-K fix-up), each number by one warp or thread in a fixed order. Bound by memory; the same on every GPU.
#include "device/launch.cuh"
#include "device/tile_sums.cuh"

namespace gradnorm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 8;  // elements of the weight that a thread of split_fixup has
constexpr int kChunk = kThreads * kPerThread;

// The sum of a value over the lanes of a warp, the same bits in every lane.
__device__ __forceinline__ double warp_total(double value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ int64_t warp_index() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; }

// A warp per column.
__global__ void __launch_bounds__(kThreads) column_sums_kernel(const __grid_constant__ ColumnSums args) {
  const int64_t column = warp_index();
  if (column >= args.columns) return;
  double sum = 0.0;
  for (int64_t row = threadIdx.x % 32; row < args.rows; row += 32) {
    sum += static_cast<double>(load_global(args.partial + row * args.columns + column));
  }
  sum = warp_total(sum);
  if (threadIdx.x % 32 == 0) store_global(args.out + column, sum);
}

// The tiles that a rank's tokens lie in: first to last; none if it is empty.
struct Tiles {
  int first, last;
};

__device__ __forceinline__ Tiles tiles_of(const GramSums& args, int rank) {
  const int begin = load_global(args.rank_begin + rank), end = load_global(args.rank_begin + rank + 1);
  if (begin >= end) return {0, -1};
  return {begin / kGramTile, (end - 1) / kGramTile};
}

// A warp per rank: its partial sums with the sample's own tokens; one off the diagonal counts twice.
__global__ void __launch_bounds__(kThreads) gram_norms_kernel(const __grid_constant__ GramSums args) {
  const int64_t index = warp_index();
  if (index >= args.ranks) return;
  const int rank = static_cast<int>(index);
  const int sample = load_global(args.rank_sample + rank);
  if (sample < 0) return;
  const Tiles tiles = tiles_of(args, rank);
  double sum = 0.0;
  for (int tile = tiles.first; tile <= tiles.last; ++tile) {
    const float* partial_row = args.partial + static_cast<int64_t>(tile + rank) * args.reach;
    for (int offset = threadIdx.x % 32; offset <= tiles.last - tile; offset += 32) {
      sum += static_cast<double>(load_global(partial_row + offset)) * (offset == 0 ? 1.0 : 2.0);
    }
  }
  sum = warp_total(sum);
  if (threadIdx.x % 32 == 0) store_global(args.out + sample, sum);
}

// A warp per pair of ranks, the first not above the second; the result goes to both places.
__global__ void __launch_bounds__(kThreads) gram_pairs_kernel(const __grid_constant__ GramSums args) {
  const int64_t index = warp_index();
  const int first = static_cast<int>(index / args.ranks), second = static_cast<int>(index % args.ranks);
  if (first >= args.ranks || first > second) return;
  const int a = load_global(args.rank_sample + first), b = load_global(args.rank_sample + second);
  if (a < 0 || b < 0) return;
  const Tiles rows = tiles_of(args, first), columns = tiles_of(args, second);
  const int width = columns.last - columns.first + 1;
  const int count = (rows.last - rows.first + 1) * width;
  double sum = 0.0;
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const int row = rows.first + i / width, column = columns.first + i % width;
    const int64_t row_partial = row + first, column_partial = column + second;
    // A sample's own tiles left of the diagonal were not made: their mirror images were.
    const int64_t at = row <= column ? row_partial * args.partials + column_partial
                                     : column_partial * args.partials + row_partial;
    sum += static_cast<double>(load_global(args.partial + at));
  }
  sum = warp_total(sum);
  if (threadIdx.x % 32 != 0) return;
  store_global(args.out + static_cast<int64_t>(a) * args.samples + b, sum);
  if (a != b) store_global(args.out + static_cast<int64_t>(b) * args.samples + a, sum);
}

// A warp per rank.
__global__ void __launch_bounds__(kThreads) token_sums_kernel(const __grid_constant__ TokenSums args) {
  const int64_t rank = warp_index();
  if (rank >= args.ranks) return;
  const int sample = load_global(args.rank_sample + rank);
  if (sample < 0) return;
  const int end = load_global(args.rank_begin + rank + 1);
  double sum = 0.0;
  for (int token = load_global(args.rank_begin + rank) + threadIdx.x % 32; token < end; token += 32) {
    sum += load_global(args.values + load_global(args.token_row + token));
  }
  sum = warp_total(sum);
  if (threadIdx.x % 32 == 0) store_global(args.out + sample, sum);
}

// The block's sum of a value per thread to `to`. `turn` alternates between calls, so that one barrier per call is enough.
__device__ __forceinline__ void block_sum(float value, int turn, float* to) {
  const SharedAddress sums = shared_base() + turn % 2 * (kWarps * 4);
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) store_shared_float(sums + threadIdx.x / 32 * 4, value);
  sync_block();
  if (threadIdx.x == 0) store_global(to, shared_sum(sums, kWarps));
}

// A block per chunk of the weight's elements, all groups one after another.
template <int kType>
__global__ void __launch_bounds__(kThreads) split_fixup_kernel(const __grid_constant__ SplitFixup args) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk + threadIdx.x;
  float outer_sum[kPerThread] = {}, total[kPerThread] = {};
  int turn = 0;
  for (int group = 0; group < args.groups; ++group) {
    float sum[kPerThread] = {};
    const int last = load_global(args.split_last + group);
    for (int split = load_global(args.split_first + group); split <= last; ++split) {
      const float* part = args.workspace + (split + group) * args.elements;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t element = begin + i * kThreads;
        if (element < args.elements) sum[i] += load_global(part + element);
      }
    }
    block_sum(sum_of_squares(sum), turn++, args.group_sq + static_cast<int64_t>(blockIdx.x) * args.groups + group);
    const int outer = load_global(args.outer + group);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) outer_sum[i] += sum[i];
    if (group + 1 < args.groups && load_global(args.outer + group + 1) == outer) continue;
    block_sum(sum_of_squares(outer_sum), turn++,
              args.outer_sq + static_cast<int64_t>(blockIdx.x) * args.outer_groups + outer);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t element = begin + i * kThreads;
      if (args.sums != nullptr && element < args.elements) {
        store_global(args.sums + outer * args.elements + element, outer_sum[i]);
      }
      total[i] += outer_sum[i];
      outer_sum[i] = 0.0f;
    }
  }
  if (args.weight_grad == nullptr) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t element = begin + i * kThreads;
    if (element < args.elements) {
      store_global(static_cast<uint16_t*>(args.weight_grad) + element, static_cast<uint16_t>(pack<kType>(total[i], 0.0f)));
    }
  }
}

int64_t blocks_for(int64_t warps) { return (warps + kWarps - 1) / kWarps; }

}  // namespace

void column_sums(const ColumnSums& args, void* stream) {
  launch("column_sums", column_sums_kernel, blocks_for(args.columns), kThreads, 0, stream, args);
}

void gram_sums(const GramSums& args, void* stream) {
  if (args.pairwise) {
    // Then a pair of ranks has fewer pairs of tiles than 2^31, in which gram_pairs_kernel counts them.
    if (args.partials > 46340) throw std::runtime_error("gram_sums: more than 46340 partial sums per side; use smaller batches");
    const int64_t pairs = static_cast<int64_t>(args.ranks) * args.ranks;
    launch("gram_sums", gram_pairs_kernel, blocks_for(pairs), kThreads, 0, stream, args);
  } else {
    launch("gram_sums", gram_norms_kernel, blocks_for(args.ranks), kThreads, 0, stream, args);
  }
}

void token_sums(const TokenSums& args, void* stream) {
  launch("token_sums", token_sums_kernel, blocks_for(args.ranks), kThreads, 0, stream, args);
}

int64_t split_fixup_rows(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

void split_fixup(const SplitFixup& args, void* stream) {
  auto* kernel = args.type == kBFloat16 ? split_fixup_kernel<kBFloat16> : split_fixup_kernel<kFloat16>;
  launch("split_fixup", kernel, split_fixup_rows(args.elements), kThreads, 2 * kWarps * 4, stream, args);
}

}  // namespace gradnorm
