// What follows the products: parts of one gradient are added in fp32 before they are squared (the split-K fix-up), and partial
// sums of tiles in fp64 (the epilogue), each number in a fixed order. Bound by memory; the same on every GPU.
#include <limits>

#include "device/launch.cuh"
#include "device/tile_sums.cuh"

namespace gradnorm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 8;  // elements of the weight that a thread of split_fixup has
constexpr int kChunk = kThreads * kPerThread;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The sum of a value over the lanes of a warp, the same bits in every lane.
__device__ __forceinline__ double warp_total(double value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ int64_t warp_index() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; }

// The tokens of a sample or group, and the tiles that they lie in: first to last, none if there are no tokens.
struct Tiles {
  int first = 0, last = -1, rank = 0;

  __device__ __forceinline__ Tiles(const int32_t* spans, int index) {
    const int32_t* span = spans + 3 * static_cast<int64_t>(index);
    const int begin = load_global(span), end = load_global(span + 1);
    rank = load_global(span + 2);
    if (begin >= end) return;
    first = begin / kGramTile;
    last = (end - 1) / kGramTile;
  }
};

// Sums of a column of the results, of which line `line` of kLines takes every kLines-th term.
constexpr int kColumns = 8;  // of the results, for each block: 32 bytes of a row of partial sums
constexpr int kLines = kThreads / kColumns;

__device__ __forceinline__ double rows_sum(const float* partial, int64_t rows, int64_t width, int column, int line) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t row = line; row < rows; row += kLines) {
    sum += static_cast<double>(load_global(partial + row * width + column));
  }
  return sum;
}

// Of the partial sums with the own tokens; one off the diagonal counts twice.
__device__ __forceinline__ double gram_sum(const float* partial, int reach, const Tiles& tiles, int line) {
  double sum = 0.0;
  for (int tile = tiles.first; tile <= tiles.last; ++tile) {
    const float* partial_row = partial + static_cast<int64_t>(tile + tiles.rank) * reach;
    for (int offset = line; offset <= tiles.last - tile; offset += kLines) {
      sum += static_cast<double>(load_global(partial_row + offset)) * (offset == 0 ? 1.0 : 2.0);
    }
  }
  return sum;
}

// Adds to what earlier passes found, and puts NaN in its place if values were out of range.
__device__ __forceinline__ void store_result(const Finish& args, bool valid, double* to, double sum) {
  if (!args.first) sum += load_global(to);
  store_global(to, args.last && !valid ? kNan : sum);
}

// A block per kColumns of the samples and groups: their squared norms.
__device__ __forceinline__ void finish_norms(const Finish& args, bool valid) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const int line = threadIdx.x / kColumns;
  const bool inside = column < int64_t{args.samples} + args.groups, of_group = column >= args.samples;
  const int index = static_cast<int>(of_group ? column - args.samples : column);
  const int state = inside ? load_global(args.state + column) : int{kAbsent};
  const int width = of_group ? args.groups : args.samples;
  double sum = 0.0;
  if (state == kWgrad && !of_group) {
    sum = rows_sum(args.wgrad_samples, args.wgrad_rows, width, index, line);
  } else if (state == kFixup && !of_group) {
    sum = rows_sum(args.fixup_samples, args.fixup_rows, width, index, line);
  } else if (state == kWgrad || state == kFixup) {
    if (args.wgrad_groups != nullptr) sum = rows_sum(args.wgrad_groups, args.wgrad_group_rows, width, index, line);
    if (state == kFixup) sum += rows_sum(args.fixup_groups, args.fixup_rows, width, index, line);
  } else if (state == kGram && of_group && args.first && args.pairs == nullptr) {
    sum = gram_sum(args.gram_groups, args.group_reach, Tiles(args.group_span, index), line);
  } else if (state == kGram && !of_group && args.first) {
    sum = gram_sum(args.gram_samples, args.sample_reach, Tiles(args.sample_span, index), line);
  }
#pragma unroll
  for (int mask = 16; mask >= kColumns; mask /= 2) sum += shuffle_xor(sum, mask);
  const SharedAddress sums = shared_base();
  if (threadIdx.x % 32 < kColumns) store_shared_double(sums + (threadIdx.x / 32 * kColumns + threadIdx.x % 32) * 8, sum);
  sync_block();
  if (threadIdx.x >= kColumns || !inside) return;
  sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += load_shared_double(sums + (warp * kColumns + threadIdx.x) * 8);
  if (!of_group) {
    store_result(args, valid, args.sample_sq + index, sum);
  } else if (args.pairs == nullptr) {
    store_result(args, valid, args.group_sq + index, sum);
    if (args.group_gram != nullptr) store_result(args, valid, args.group_gram + index * (int64_t{args.groups} + 1), sum);
  }
}

// The part of this lane in the inner product of two groups, from what gram_sm80 left pairwise. Ranks ascend with the groups.
__device__ __forceinline__ double pair_sum(const Finish& args, int a, int b) {
  const Tiles rows(args.group_span, a), columns(args.group_span, b);
  const int width = columns.last - columns.first + 1;
  const int count = (rows.last - rows.first + 1) * width;
  double sum = 0.0;
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const int row = rows.first + i / width, column = columns.first + i % width;
    const int64_t row_partial = row + rows.rank, column_partial = column + columns.rank;
    // A group's own tiles left of the diagonal were not made: their mirror images were.
    const int64_t at = row <= column ? row_partial * args.partials + column_partial
                                     : column_partial * args.partials + row_partial;
    sum += static_cast<double>(load_global(args.pairs + at));
  }
  return sum;
}

// The same from the products of the groups' sums, of which those above the diagonal count.
__device__ __forceinline__ double product_sum(const Finish& args, int64_t a, int64_t b) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t slab = threadIdx.x % 32; slab < args.slabs; slab += 32) {
    sum += static_cast<double>(load_global(args.products + (slab * args.groups + a) * args.groups + b));
  }
  return sum;
}

// A warp per pair of groups, the first not above the second; the result goes to both places.
__device__ __forceinline__ void finish_pairs(const Finish& args, bool valid, int64_t index) {
  const int a = static_cast<int>(index / args.groups), b = static_cast<int>(index % args.groups);
  // The diagonal is the groups' squared norms, which finish_norms takes from their sums' squares.
  if (a >= args.groups || a > b || (a == b && args.pairs == nullptr)) return;
  const double sum = warp_total(args.pairs != nullptr ? pair_sum(args, a, b) : product_sum(args, a, b));
  if (threadIdx.x % 32 != 0) return;
  store_result(args, valid, args.group_gram + int64_t{a} * args.groups + b, sum);
  if (a != b) {
    store_result(args, valid, args.group_gram + int64_t{b} * args.groups + a, sum);
  } else {
    store_result(args, valid, args.group_sq + a, sum);
  }
}

int64_t norm_blocks(const Finish& args) { return (int64_t{args.samples} + args.groups + kColumns - 1) / kColumns; }

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Finish args, int norm_blocks) {
  const bool valid = load_global(args.info) != 0;
  if (blockIdx.x >= norm_blocks) {
    finish_pairs(args, valid, warp_index() - int64_t{norm_blocks} * kWarps);
    return;
  }
  finish_norms(args, valid);
  if (blockIdx.x > 0 || valid || !args.last || args.weight_grad == nullptr) return;
  for (int column = threadIdx.x; column < args.d_in; column += kThreads) {
    store_global(static_cast<uint16_t*>(args.weight_grad) + column, uint16_t{0x7fff});  // NaN in both types
  }
}

// A warp per sample.
__global__ void __launch_bounds__(kThreads) token_sums_kernel(const __grid_constant__ TokenSums args) {
  const int64_t sample = warp_index();
  if (sample >= args.samples) return;
  const int end = load_global(args.sample_span + 3 * sample + 1);
  double sum = 0.0;
  for (int token = load_global(args.sample_span + 3 * sample) + threadIdx.x % 32; token < end; token += 32) {
    sum += load_global(args.values + load_global(args.token_row + token));
  }
  sum = warp_total(sum);
  if (threadIdx.x % 32 == 0) store_global(args.out + sample, load_global(args.info) != 0 ? sum : kNan);
}

// The block's sum of a value per thread to `to`. `turn` alternates between calls, so that one barrier per call is enough.
__device__ __forceinline__ void block_sum(float value, int turn, float* to) {
  const SharedAddress sums = shared_base() + turn % 2 * (kWarps * 4);
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) store_shared_float(sums + threadIdx.x / 32 * 4, value);
  sync_block();
  if (threadIdx.x == 0) store_global(to, shared_sum(sums, kWarps));
}

// Inner products of the groups' sums in a block's chunk. Every thread keeps its elements of each group's sum in shared
// memory, which no other thread reads, and each warp the sum of its products of every pair of groups.
class GroupProducts {
 public:
  static constexpr int kGroupBytes = kChunk * 4;

  __host__ __device__ static constexpr int pairs(int groups) { return groups * (groups - 1) / 2; }
  __host__ __device__ static constexpr int bytes(int groups) { return groups * kGroupBytes + pairs(groups) * kWarps * 4; }

  __device__ __forceinline__ GroupProducts(SharedAddress shared, int groups)
      : own_(shared + threadIdx.x * 4), pairs_(shared + groups * kGroupBytes), groups_(groups) {}

  // The sum of a group, after those of all groups before it.
  __device__ __forceinline__ void add(int group, const float (&sum)[kPerThread]) {
    for (int other = 0; other < group; ++other) {
      float product = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) product += sum[i] * load_shared_float(at(other, i));
      product = warp_sum(product);
      if (threadIdx.x % 32 == 0) store_shared_float(pair_at(other, group) + threadIdx.x / 32 * 4, product);
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) store_shared_float(at(group, i), sum[i]);
  }

  // Writes those above the diagonal of `to` [groups, groups], once all groups are added.
  __device__ __forceinline__ void store(float* to) const {
    sync_block();
    for (int i = threadIdx.x; i < groups_ * groups_; i += kThreads) {
      if (i / groups_ < i % groups_) store_global(to + i, shared_sum(pair_at(i / groups_, i % groups_), kWarps));
    }
  }

 private:
  __device__ __forceinline__ SharedAddress at(int group, int i) const { return own_ + group * kGroupBytes + i * kThreads * 4; }

  __device__ __forceinline__ SharedAddress pair_at(int a, int b) const { return pairs_ + (pairs(b) + a) * kWarps * 4; }

  SharedAddress own_, pairs_;
  int groups_;
};
static_assert(GroupProducts::bytes(kFixupGroups) + 2 * kWarps * 4 <= 99 * 1024, "GPUs of 8.6 and 8.9 have no more per block");

// A block per chunk of the weight's elements, all inner sums one after another.
template <int kType>
__global__ void __launch_bounds__(kThreads) split_fixup_kernel(const __grid_constant__ SplitFixup args) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk + threadIdx.x;
  float group_sum[kPerThread] = {}, total[kPerThread] = {};
  GroupProducts products(shared_base() + 2 * kWarps * 4, args.groups);
  int turn = 0;
  for (int inner = 0; inner < args.inner; ++inner) {
    float sum[kPerThread] = {};
    const int last = load_global(args.split_last + inner);
    for (int split = load_global(args.split_first + inner); split <= last; ++split) {
      if (load_global(args.split_start + split) == load_global(args.split_start + split + 1)) continue;
      const float* part = args.workspace + (split + inner) * args.elements;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t element = begin + i * kThreads;
        if (element < args.elements) sum[i] += load_global(part + element);
      }
    }
    const int sample = args.inner_sample == nullptr ? -1 : load_global(args.inner_sample + inner);
    if (sample >= 0) {
      block_sum(sum_of_squares(sum), turn++, args.sample_sq + static_cast<int64_t>(blockIdx.x) * args.samples + sample);
    }
    const int group = load_global(args.outer + inner);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) group_sum[i] += sum[i];
    if (inner + 1 < args.inner && load_global(args.outer + inner + 1) == group) continue;
    block_sum(sum_of_squares(group_sum), turn++, args.group_sq + static_cast<int64_t>(blockIdx.x) * args.groups + group);
    if (args.products != nullptr) products.add(group, group_sum);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t element = begin + i * kThreads;
      if (args.sums != nullptr && element < args.width) store_global(args.sums + group * args.width + element, group_sum[i]);
      total[i] += group_sum[i];
      group_sum[i] = 0.0f;
    }
  }
  if (args.products != nullptr) {
    products.store(args.products + static_cast<int64_t>(blockIdx.x) * args.groups * args.groups);
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

void finish(const Finish& args, void* stream) {
  // Then a pair of groups has fewer pairs of tiles than 2^31, in which pair_sum counts them.
  if (args.pairs != nullptr && args.partials > 46340) {
    throw std::runtime_error("finish: more than 46340 partial sums per side; use smaller batches");
  }
  const bool beside = args.group_gram != nullptr && (args.pairs != nullptr || args.products != nullptr);
  const int64_t norms = norm_blocks(args), pairs = beside ? blocks_for(int64_t{args.groups} * args.groups) : 0;
  launch("finish", finish_kernel, norms + pairs, kThreads, kWarps * kColumns * 8, stream, args, static_cast<int>(norms));
}

void token_sums(const TokenSums& args, void* stream) {
  launch("token_sums", token_sums_kernel, blocks_for(args.samples), kThreads, 0, stream, args);
}

int64_t split_fixup_rows(int64_t width) { return (width + kChunk - 1) / kChunk; }

void split_fixup(const SplitFixup& args, void* stream) {
  if (args.products != nullptr && (args.groups > kFixupGroups || args.inner != args.groups)) {
    throw std::runtime_error("split_fixup: products are of at most " + std::to_string(kFixupGroups) +
                             " groups, whose sums are the inner ones");
  }
  auto* kernel = args.type == kBFloat16 ? split_fixup_kernel<kBFloat16> : split_fixup_kernel<kFloat16>;
  const int products = args.products == nullptr ? 0 : GroupProducts::bytes(args.groups);
  launch("split_fixup", kernel, split_fixup_rows(args.width), kThreads, 2 * kWarps * 4 + products, stream, args);
}

}  // namespace gradnorm
