// The prologue of every call: one block checks the segments and makes the tables that the products, the split-K fix-up and
// the epilogue read (launchers.h says which). Nothing is read back to the host, and nothing has to be zeroed before.
//
// Positions count the rows of all segments in their order. Split p begins at position p * tokens / splits, rounded down.
#include "device/launch.cuh"
#include "device/offsets.cuh"
#include "device/ptx_sm80.cuh"

namespace gradnorm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSharedBytes = 2 * kWarps * 8;

struct Pair {
  int a = 0, b = 0;
  __device__ __forceinline__ void add(Pair more) {
    a += more.a;
    b += more.b;
  }
};

// The sums over the block's threads before this one, and over all.
struct Scan {
  Pair before, all;
};

// `turn` alternates between calls, so that one barrier per call is enough.
__device__ __forceinline__ Scan block_scan(Pair value, int& turn) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Scan scan{{}, {}};
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const Pair other{shuffle_xor(value.a, mask), shuffle_xor(value.b, mask)};
    if ((lane & mask) != 0) scan.before.add(other);
    value.add(other);
  }
  const SharedAddress sums = shared_base() + turn++ % 2 * (kWarps * 8);
  if (lane == 0) {
    store_shared_int(sums + warp * 8, value.a);
    store_shared_int(sums + warp * 8 + 4, value.b);
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const Pair sum{load_shared_int(sums + i * 8), load_shared_int(sums + i * 8 + 4)};
    if (i < warp) scan.before.add(sum);
    scan.all.add(sum);
  }
  return scan;
}

// The segments that have rows, without gaps, in `workspace`.
struct Filled {
  int32_t *row, *begin, *sample, *group, *sample_rank, *group_rank, *gram_begin;
  int count = 0;

  __device__ __forceinline__ explicit Filled(const Schedule& args) {
    const int64_t size = static_cast<int64_t>(args.segments) + 1;
    row = args.workspace;
    begin = row + size;  // positions; [count + 1]
    sample = begin + size;
    group = sample + size;
    sample_rank = group + size;
    group_rank = sample_rank + size;
    gram_begin = group_rank + size;  // positions among the tokens that are for the Gram
  }
};

// Rows of segment `index` as given.
__device__ __forceinline__ Rows rows_of(const Schedule& args, int index) {
  if (args.end != nullptr) {
    return {load_global(static_cast<const int64_t*>(args.start) + index), load_global(args.end + index)};
  }
  return given_rows(args.start, args.wide, args.length, index);
}

// Whether the values are in range, the same in every thread.
__device__ __forceinline__ bool check_values(const Schedule& args, int& turn) {
  if (args.valid != nullptr) return load_global(args.valid) != 0;
  if (args.end != nullptr || args.start == nullptr) return true;
  int wrong = 0;
  for (int i = threadIdx.x; i < args.segments; i += kThreads) {
    wrong |= are_wrong(rows_of(args, i), i, args.segments, args.tokens);
  }
  return block_scan({wrong, 0}, turn).all.a == 0;
}

// Samples, groups and inner sums that no segment names.
__device__ __forceinline__ void clear(const Schedule& args) {
  for (int i = threadIdx.x; i < args.samples + args.groups; i += kThreads) store_global(args.state + i, int{kAbsent});
  if (args.sample_span != nullptr) {
    for (int i = threadIdx.x; i < 3 * args.samples; i += kThreads) store_global(args.sample_span + i, 0);
  }
  if (args.group_span != nullptr) {
    for (int i = threadIdx.x; i < 3 * args.groups; i += kThreads) store_global(args.group_span + i, 0);
  }
  if (args.split_first == nullptr) return;
  for (int i = threadIdx.x; i < args.inner; i += kThreads) {
    store_global(args.split_first + i, 1);
    store_global(args.split_last + i, 0);
    // Inner sums that are not used have nothing to add: they may name the last group.
    store_global(args.outer + i, args.anywhere ? args.groups - 1 : i);
    if (args.anywhere) store_global(args.inner_sample + i, -1);
  }
}

__device__ __forceinline__ void collect(const Schedule& args, bool valid, Filled& filled, int& turn) {
  const bool plain = args.end == nullptr;
  Pair done;
  for (int base = 0; base < args.segments; base += kThreads) {
    const int i = base + threadIdx.x;
    Rows rows{0, 0};
    if (i < args.segments) {
      if (valid || !plain) {
        rows = rows_of(args, i);
      } else if (i == 0) {
        rows.end = args.tokens;
      }
    }
    const bool kept = rows.end > rows.row;
    const Scan scan = block_scan({kept, kept ? static_cast<int>(rows.end - rows.row) : 0}, turn);
    if (kept) {
      const int to = done.a + scan.before.a;
      store_global(filled.row + to, static_cast<int32_t>(rows.row));
      store_global(filled.begin + to, done.b + scan.before.b);
      store_global(filled.sample + to, plain ? i : load_global(args.sample + i));
      store_global(filled.group + to, plain ? 0 : load_global(args.group + i));
    }
    done.add(scan.all);
  }
  filled.count = done.a;
  if (threadIdx.x == 0) store_global(filled.begin + done.a, done.b);
}

// Whether `index` is the first or the last of the neighbours with one value.
struct Place {
  bool first, last;
};

__device__ __forceinline__ Place place_among(const int32_t* values, int index, int count) {
  const int value = load_global(values + index);
  return {index == 0 || load_global(values + index - 1) != value,
          index == count - 1 || load_global(values + index + 1) != value};
}

// Ranks, which count the samples and groups that have rows; and the positions of each sample.
__device__ __forceinline__ void rank(const Schedule& args, const Filled& filled, int& turn) {
  Pair done;
  for (int base = 0; base < filled.count; base += kThreads) {
    const int i = base + threadIdx.x;
    Place sample{false, false}, group{false, false};
    if (i < filled.count) {
      sample = place_among(filled.sample, i, filled.count);
      group = place_among(filled.group, i, filled.count);
    }
    const Scan scan = block_scan({sample.first, group.first}, turn);
    if (i < filled.count) {
      store_global(filled.sample_rank + i, done.a + scan.before.a + sample.first - 1);
      store_global(filled.group_rank + i, done.b + scan.before.b + group.first - 1);
      const int64_t name = load_global(filled.sample + i);
      if (sample.first) store_global(args.spans + 2 * name, load_global(filled.begin + i));
      if (sample.last) store_global(args.spans + 2 * name + 1, load_global(filled.begin + i + 1));
    }
    done.add(scan.all);
  }
}

// The last split that begins at or before a position.
__device__ __forceinline__ int split_of(const Schedule& args, int position) {
  return static_cast<int>(((static_cast<int64_t>(position) + 1) * args.splits - 1) / args.tokens);
}

// What is made of one segment: its pieces in the splits `first` to `last`, and its tokens for the Gram.
struct Part {
  int row, begin, end, sample, group;
  int first = 0, last = -1;
  int gram_tokens = 0;
};

__device__ __forceinline__ Part part_of(const Schedule& args, const Filled& filled, int i) {
  Part part{load_global(filled.row + i), load_global(filled.begin + i), load_global(filled.begin + i + 1),
            load_global(filled.sample + i), load_global(filled.group + i)};
  const int32_t* span = args.spans + 2 * static_cast<int64_t>(part.sample);
  const int begin = load_global(span);
  if (load_global(span + 1) - begin <= args.gram_tokens) part.gram_tokens = part.end - part.begin;
  if (args.splits > 0) {
    part.first = split_of(args, args.anywhere ? part.begin : begin);
    part.last = args.anywhere ? split_of(args, part.end - 1) : part.first;
  }
  return part;
}

// Where the squared norms of the part's sample and group are found.
__device__ __forceinline__ void store_states(const Schedule& args, const Part& part, Place sample, Place group) {
  const int of_wgrad = args.anywhere ? kFixup : kWgrad;
  if (sample.first) store_global(args.state + part.sample, part.gram_tokens > 0 ? int{kGram} : of_wgrad);
  const int of_groups = args.splits == 0 ? kGram : args.stored ? kFixup : kWgrad;
  if (group.first) store_global(args.state + args.samples + part.group, of_groups);
}

// The part's pieces in wgrad's table, from place `to` on; `before`: the split of the piece before.
__device__ __forceinline__ void store_pieces(const Schedule& args, const Part& part, int inner, int to, int before) {
  const bool measured = !args.anywhere && part.gram_tokens == 0;
  for (int split = part.first; split <= part.last; ++split, ++to) {
    int begin = part.begin, end = part.end;
    if (args.anywhere) {
      begin = max(begin, static_cast<int>(static_cast<int64_t>(split) * args.tokens / args.splits));
      end = min(end, static_cast<int>(static_cast<int64_t>(split + 1) * args.tokens / args.splits));
    }
    store_global(args.segment_start + to, part.row + begin - part.begin);
    store_global(args.segment_end + to, part.row + end - part.begin);
    store_global(args.segment_sample + to, measured ? part.sample : -1);
    store_global(args.segment_group + to, inner);
    for (; before < split; ++before) store_global(args.split_start + before + 1, to);
  }
}

// Tables of segments: for wgrad, for the fix-up, and where the Gram's tokens of each lie.
__device__ __forceinline__ void store_tables(const Schedule& args, const Filled& filled, int& turn) {
  Pair done;
  for (int base = 0; base < filled.count; base += kThreads) {
    const int i = base + threadIdx.x;
    const bool inside = i < filled.count;
    Part part{};
    if (inside) part = part_of(args, filled, i);
    const int pieces = inside ? part.last - part.first + 1 : 0;
    const Scan scan = block_scan({pieces, part.gram_tokens}, turn);
    if (inside) {
      const Place sample = place_among(filled.sample, i, filled.count), group = place_among(filled.group, i, filled.count);
      const int sample_rank = load_global(filled.sample_rank + i), group_rank = load_global(filled.group_rank + i);
      store_states(args, part, sample, group);
      const int inner = args.anywhere ? sample_rank : part.group;
      if (args.splits > 0) {
        const int to = done.a + scan.before.a;
        int before = -1;
        if (i > 0) before = args.anywhere ? split_of(args, part.begin - 1) : part_of(args, filled, i - 1).last;
        store_pieces(args, part, inner, to, before);
        if (i == filled.count - 1) {
          for (int split = part.last; split < args.splits; ++split) store_global(args.split_start + split + 1, to + pieces);
        }
      }
      if (args.split_first != nullptr) {
        const Place place = args.anywhere ? sample : group;
        if (place.first) {
          store_global(args.split_first + inner, part.first);
          if (args.anywhere) {
            store_global(args.outer + inner, part.group);
            store_global(args.inner_sample + inner, part.sample);
          }
        }
        if (place.last) store_global(args.split_last + inner, part.last);
      }
      const int begin = done.b + scan.before.b, end = begin + part.gram_tokens;
      store_global(filled.gram_begin + i, begin);
      const auto store_span = [&](int32_t* spans, int name, Place place, int rank) {
        if (spans == nullptr) return;
        int32_t* span = spans + 3 * static_cast<int64_t>(name);
        if (place.first) {
          store_global(span, begin);
          store_global(span + 2, rank);
        }
        if (place.last) store_global(span + 1, end);
      };
      store_span(args.sample_span, part.sample, sample, sample_rank);
      store_span(args.group_span, part.group, group, group_rank);
    }
    done.add(scan.all);
  }
  if (threadIdx.x == 0) {
    store_global(filled.gram_begin + filled.count, done.b);
    store_global(args.info + 1, done.b);
  }
}

// The tokens that are for the Gram, a warp per segment.
__device__ __forceinline__ void store_tokens(const Schedule& args, const Filled& filled) {
  for (int i = threadIdx.x / 32; i < filled.count; i += kWarps) {
    const int begin = load_global(filled.gram_begin + i), count = load_global(filled.gram_begin + i + 1) - begin;
    const int row = load_global(filled.row + i);
    const int sample_rank = load_global(filled.sample_rank + i), group_rank = load_global(filled.group_rank + i);
    for (int token = threadIdx.x % 32; token < count; token += 32) {
      store_global(args.token_row + begin + token, row + token);
      if (args.sample_rank != nullptr) store_global(args.sample_rank + begin + token, sample_rank);
      if (args.group_rank != nullptr) store_global(args.group_rank + begin + token, group_rank);
    }
  }
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(const __grid_constant__ Schedule args) {
  int turn = 0;
  Filled filled(args);
  const bool valid = check_values(args, turn);
  if (threadIdx.x == 0) store_global(args.info, int{valid});
  clear(args);
  collect(args, valid, filled, turn);
  sync_block();
  rank(args, filled, turn);
  sync_block();
  store_tables(args, filled, turn);
  if (args.token_row == nullptr) return;
  sync_block();
  store_tokens(args, filled);
}

}  // namespace

void schedule(const Schedule& args, void* stream) {
  launch("schedule", schedule_kernel, 1, kThreads, kSharedBytes, stream, args);
}

}  // namespace gradnorm
