// The table of segments from ids that lie on the device: segments in the order of (group, sample), checked, in one launch.
//
// A segment's place is the number of segments that come before it: every block counts them for its own, against all.
// That is quadratic in the number of segments, which are few, and the bits are the same whatever the order of blocks.
#include "device/launch.cuh"
#include "device/offsets.cuh"
#include "device/ptx_sm80.cuh"

namespace gradnorm {
namespace {

constexpr int kRows = 32;  // segments of a block, a lane of every warp for each
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSharedBytes = (kWarps * kRows + kWarps) * 4;

// An id, and `wrong` where it is out of range: it is then the next one that is not.
__device__ __forceinline__ int id_at(const void* ids, bool wide, int64_t index, int count, int& wrong) {
  const int64_t id = number_at(ids, wide, index);
  wrong |= id < 0 || id >= count;
  return static_cast<int>(id < 0 ? 0 : id >= count ? count - 1 : id);
}

__device__ __forceinline__ Rows rows_of(const SegmentTable& args, int segment) {
  return given_rows(args.offsets, args.offsets_wide, args.length, segment);
}

// By which segments are sorted; those of one key stay in their order.
struct Key {
  int group, sample;
};

__device__ __forceinline__ Key key_of(const SegmentTable& args, int segment, int& wrong) {
  Key key{0, segment};
  if (args.sample_ids != nullptr) key.sample = id_at(args.sample_ids, args.samples_wide, segment, args.samples, wrong);
  if (args.group_ids != nullptr) key.group = id_at(args.group_ids, args.groups_wide, key.sample, args.groups, wrong);
  return key;
}

__global__ void __launch_bounds__(kThreads) segment_table_kernel(const __grid_constant__ SegmentTable args) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int mine = static_cast<int>(blockIdx.x) * kRows + lane;
  int wrong = 0, before = 0;
  Key own{0, 0};
  if (mine < args.segments) own = key_of(args, mine, wrong);
  for (int base = 32 * warp; base < args.segments; base += kThreads) {
    Key key{0, 0};
    if (base + lane < args.segments) {
      key = key_of(args, base + lane, wrong);
      wrong |= are_wrong(rows_of(args, base + lane), base + lane, args.segments, args.tokens);
    }
#pragma unroll
    for (int mask = 0; mask < 32; ++mask) {
      const Key other{shuffle_xor(key.group, mask), shuffle_xor(key.sample, mask)};
      const int at = base + (lane ^ mask);
      const bool equal = other.group == own.group && other.sample == own.sample;
      const bool less = other.group < own.group || (other.group == own.group && other.sample < own.sample);
      before += at < args.segments && (less || (equal && at < mine));
    }
  }
  // Groups of samples that no segment names are checked too.
  if (args.group_ids != nullptr) {
    for (int i = threadIdx.x; i < args.samples; i += kThreads) id_at(args.group_ids, args.groups_wide, i, args.groups, wrong);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) wrong |= shuffle_xor(wrong, mask);
  const SharedAddress counts = shared_base(), flags = counts + kWarps * kRows * 4;
  store_shared_int(counts + threadIdx.x * 4, before);
  if (lane == 0) store_shared_int(flags + warp * 4, wrong);
  sync_block();
  if (warp > 0) return;
  int place = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    place += load_shared_int(counts + (i * kRows + lane) * 4);
    wrong |= load_shared_int(flags + i * 4);
  }
  if (mine == 0) store_global(args.valid, static_cast<uint8_t>(wrong == 0));
  if (mine >= args.segments) return;
  Rows rows{place == 0 ? 0 : args.tokens, args.tokens};
  if (wrong == 0) rows = rows_of(args, mine);
  store_global(args.start + place, rows.row);
  store_global(args.end + place, rows.end);
  store_global(args.sample + place, int32_t{own.sample});
  store_global(args.group + place, int32_t{own.group});
}

}  // namespace

void segment_table(const SegmentTable& args, void* stream) {
  launch("segment_table", segment_table_kernel, (static_cast<int64_t>(args.segments) + kRows - 1) / kRows, kThreads,
         kSharedBytes, stream, args);
}

}  // namespace gradnorm
