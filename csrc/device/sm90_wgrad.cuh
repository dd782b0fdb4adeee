// Segmented wgrad for sm_90a: dW tiles, ||G_i||^2 and ||sum of G_i||^2 from one pass over the tokens.
//
// A block owns a tile of 128 rows (d_out) by kColumns columns (d_in), for all segments or for one split of them. Its first
// warpgroup, the producer, is one thread that walks the segments and keeps copies of K tiles in flight, across samples
// and tiles. The other two, the consumers, own 64 rows each and multiply what arrives. At a sample's end they square
// their accumulators and add them to the running sum in registers, while the producer's copies of the next sample, and
// the other consumer's products, go on: for that the second consumer keeps a stage behind the first (`staggered`).
// Left to themselves they would wait for the same copies and end a sample at the same time.
#pragma once

#include <type_traits>

#include "segments.cuh"
#include "sm90_fragment.cuh"
#include "sm90_tiles.cuh"

namespace gradnorm::sm90 {

// The segments of a split: empty ones left out, neighbours of one sample and group merged.
struct SegmentWalk {
  const WgradNorm& args;
  int index, last;

  __device__ __forceinline__ bool next(Segment& segment) {
    bool found = false;
    for (; index < last; ++index) {
      const Segment here{load_global(args.segment_start + index), load_global(args.segment_end + index),
                     load_global(args.segment_sample + index), load_global(args.segment_group + index)};
      if (here.end <= here.row) continue;
      if (!found) {
        segment = here;
        found = true;
      } else if (here.row == segment.end && here.sample == segment.sample && here.group == segment.group) {
        segment.end = here.end;
      } else {
        break;
      }
    }
    return found;
  }
};

// The work items of a cluster: where it has several blocks, as many tiles at a time, one below the other.
template <typename C>
WorkGrid grid_of(const WgradNorm& args) {
  const int rows = (args.d_out - 1) / kTileRows + 1, columns = (args.d_in - 1) / C::kColumns + 1;
  const int band = args.group_m / C::kCluster;
  return {rows / C::kCluster, columns, args.whole_rows / C::kCluster, args.splits, band > 1 ? band : 1};
}

// Where the tile of block `rank` of a cluster is.
template <typename C>
__device__ __forceinline__ TilePlace place_in(const WorkGrid& grid, int tile, int rank) {
  TilePlace place = grid.place_of(tile);
  place.row = place.row * C::kCluster + rank;
  return place;
}

// Waits until a stage's products have been made, in every block that the copies into it go to.
template <typename C>
__device__ __forceinline__ void wait_free(const Shared<C>& shared, int stage, uint32_t parity) {
  if constexpr (C::kCluster > 1) {
    mbarrier_wait_cluster(shared.empty(stage), parity);
  } else {
    mbarrier_wait(shared.empty(stage), parity);
  }
}

template <typename C>
__device__ __forceinline__ void produce(const TensorMap* x_map, const TensorMap* dy_map, const WgradNorm& args,
                                        const WorkGrid& grid, const Shared<C>& shared) {
  tensor_map_prefetch(x_map);
  tensor_map_prefetch(dy_map);
  Ring<C::kStages> ring;
  const int rank = static_cast<int>(blockIdx.x) % C::kCluster, items = static_cast<int>(grid.items());
  for (int item = blockIdx.x / C::kCluster; item < items; item += gridDim.x / C::kCluster) {
    const int split = grid.split_of(item), tile = grid.tile_of(item);
    const TilePlace place = place_in<C>(grid, tile, rank);
    const int first_row = place.row * kTileRows, first_column = place.column * C::kColumns;
    SegmentWalk walk{args, grid.first_segment(args.split_start, split), grid.segment_end(args.split_start, split)};
    Segment segment{}, following{};
    int first_group = kFirstGroup;
    for (bool more = walk.next(segment); more; segment = following) {
      more = walk.next(following);
      const bool group_ends = !more || following.group != segment.group;
      // The first K tile takes the rows that do not fill one, and the consumers' loop over the others has no condition.
      int rows = (segment.end - segment.row - 1) % C::kTokens + 1;
      const int k_tiles = (segment.end - segment.row - 1) / C::kTokens + 1;
      Tag tag{split < 0 ? 0 : kStored, segment.sample, segment.group + max(split, 0), tile * C::kCluster + rank,
              k_tiles, (rows - 1) / kStepTokens + 1};
      if (group_ends || following.sample != segment.sample) tag.flags |= kSampleEnds;
      if (group_ends) {
        tag.flags |= kGroupEnds | first_group | (more ? 0 : kLastGroup);
        first_group = 0;
      }
      for (int row = segment.row; row < segment.end; row += rows, rows = C::kTokens) {
        const int stage = ring.stage;
        wait_free(shared, stage, ring.parity ^ 1);
        if (row == segment.row) shared.store_tag(stage, tag);
        mbarrier_arrive_expect(shared.full(stage), C::kStageBytes);
        // In the maps (ragged_map) this box holds zeros and then, to its end, the `rows` rows from `row` on.
        const int begin = rows - C::kTokens;
#pragma unroll
        for (int i = 0; i < C::kRowPanels; ++i) {
          tensor_load(shared.rows(stage, i), dy_map, shared.full(stage), first_row + i * kPanelColumns, begin, row);
        }
#pragma unroll
        for (int i = 0; i < C::kColumnPanels; ++i) {
          const int column = first_column + i * kPanelColumns;
          if constexpr (C::kCluster == 1) {
            tensor_load(shared.columns(stage, i), x_map, shared.full(stage), column, begin, row);
          } else if (i % C::kCluster == rank) {  // the other blocks load the other panels, here too
            tensor_load_multicast(shared.columns(stage, i), x_map, shared.full(stage), column, begin, row,
                                  (1 << C::kCluster) - 1);
          }
        }
        ring.advance();
      }
    }
  }
  wait_free(shared, ring.stage, ring.parity ^ 1);
  shared.store_tag(ring.stage, Tag{kExit, -1, 0, 0, 0, 0});
  mbarrier_arrive(shared.full(ring.stage));
}

// A thread among the consumers.
struct Consumer {
  int group, warp, lane;  // its warpgroup, its warp in there
  int turn = 0;

  // Adds `value` over the warpgroup and stores the sum at `out`, unless that is null. The shared slots are used in
  // turn, so that one barrier is enough: a slot is written again after the next call's barrier, where its reader has
  // been.
  template <typename C>
  __device__ __forceinline__ void store_sum(const Shared<C>& shared, float value, float* out) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    const SharedAddress slots = shared.norms(group, turn);
    turn ^= 1;
    if (lane == 0) store_shared_float(slots + 4 * warp, value);
    barrier_wait(1 + group, 128);
    if (out != nullptr && warp == 0 && lane == 0) {
      const float low = load_shared_float(slots) + load_shared_float(slots + 4);
      const float high = load_shared_float(slots + 8) + load_shared_float(slots + 12);
      store_global(out, low + high);
    }
  }

  // Hands a stage back to the producer, once for each warp. The first consumer tells the second.
  template <typename C>
  __device__ __forceinline__ void release(const Shared<C>& shared, int stage) const {
    sync_warp();
    if (lane == 0) mbarrier_arrive(shared.empty(stage));
    if (C::kCluster > 1 && lane == 1) mbarrier_arrive_at(static_cast<int>(blockIdx.x) % C::kCluster ^ 1,
                                                         shared.empty(stage));
    if (lane == 0 && group == 0) mbarrier_arrive(shared.led(stage));
  }
};

// A consumer thread's part of a group's sum: C::kHeld elements in registers, the others in shared memory, where no
// other thread touches them.
template <typename C>
struct GroupSum {
  SharedAddress rest;  // of the first four elements there
  float held[C::kHeld];
  static_assert((C::kFragment - C::kHeld) % 16 == 0, "`add` reads sixteen elements before it writes them");

  // Where elements i to i + 3 are.
  __device__ __forceinline__ SharedAddress place(int i) const {
    return rest + (i - C::kHeld) / 4 * Shared<C>::kSumStride;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < C::kHeld; ++i) held[i] = 0.0f;
#pragma unroll
    for (int i = C::kHeld; i < C::kFragment; i += 4) store_shared_float4(place(i), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }

  __device__ __forceinline__ void add(const float (&product)[C::kFragment]) {
#pragma unroll
    for (int i = 0; i < C::kHeld; ++i) held[i] += product[i];
#pragma unroll
    for (int i = C::kHeld; i < C::kFragment; i += 16) {
      float4 four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = load_shared_float4(place(i + 4 * j));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* more = product + i + 4 * j;
        store_shared_float4(place(i + 4 * j), make_float4(four[j].x + more[0], four[j].y + more[1], four[j].z + more[2],
                                                          four[j].w + more[3]));
      }
    }
  }

  // Copies the sum into `to`.
  __device__ __forceinline__ void copy(float (&to)[C::kFragment]) const {
#pragma unroll
    for (int i = 0; i < C::kHeld; ++i) to[i] = held[i];
#pragma unroll
    for (int i = C::kHeld; i < C::kFragment; i += 4) {
      const float4 four = load_shared_float4(place(i));
      to[i] = four.x;
      to[i + 1] = four.y;
      to[i + 2] = four.z;
      to[i + 3] = four.w;
    }
  }
};

// Calls visit with a constant that is equal to `value`, which is 1 to kMost.
template <int kMost, typename Visit>
__device__ __forceinline__ void with_constant(int value, const Visit& visit) {
  if constexpr (kMost > 1) {
    if (value < kMost) return with_constant<kMost - 1>(value, visit);
  }
  visit(std::integral_constant<int, kMost>());
}

template <typename C>
__device__ __forceinline__ Fragment fragment_of(const WgradNorm& args, const TilePlace& place, const Consumer& me) {
  const int row = place.row * kTileRows + 64 * me.group + 16 * me.warp + me.lane / 4;
  const int column = place.column * C::kColumns + me.lane % 4 * 2;
  return {row, column, args.d_out, args.d_in};
}

// The end of a group: `sum` is the group's sum of this split.
template <typename C>
__device__ __forceinline__ void finish_group(const WgradNorm& args, const Shared<C>& shared, Consumer& me,
                                             const Tag& tag, const Fragment& in, float (&sum)[C::kFragment]) {
  const bool even = args.d_in % 2 == 0, stored = tag.flags & kStored;
  const int above = stored ? args.whole_rows * kTileRows : 0;  // rows of the weight that are not in the workspace
  float* to = nullptr;  // where the sum is stored in fp32, or null
  if (stored) {
    to = args.workspace + int64_t{tag.sum_index} * (args.d_out - above) * args.d_in;
  } else {
    const int64_t partial = int64_t{2} * tag.tile + me.group;
    me.store_sum(shared, in.sum_of_squares(sum), args.group_sq + partial * args.groups + tag.sum_index);
    if (args.weight_grad == nullptr) return;
    if (!(tag.flags & kLastGroup)) to = args.running;
  }
  const int64_t first = int64_t{in.row - above} * args.d_in + in.column;
  if (!stored && !(tag.flags & kFirstGroup)) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const float* from = args.running + first + 8 * upper * args.d_in;
      if (!(upper ? in.high() : in.low())) continue;
      even ? add_row<true>(in, upper, sum, from) : add_row<false>(in, upper, sum, from);
    }
  }
  uint16_t* weight = static_cast<uint16_t*>(args.weight_grad);
  const bool whole = in.columns() + me.lane % 4 * 2 >= C::kColumns;
  if (to == nullptr && whole && args.d_in % 8 == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0) {
    cast_whole<C::kType>(in, me.lane, sum, args.d_in, weight);
    return;
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int64_t row = first + int64_t{8} * upper * args.d_in;
    if (!(upper ? in.high() : in.low())) continue;
    if (to != nullptr) {
      even ? store_row<true>(in, upper, sum, to + row) : store_row<false>(in, upper, sum, to + row);
    } else {
      even ? cast_row<C::kType, true>(in, upper, sum, weight + row)
           : cast_row<C::kType, false>(in, upper, sum, weight + row);
    }
  }
}

template <typename C>
__device__ __forceinline__ void consume(const WgradNorm& args, const WorkGrid& grid, const Shared<C>& shared, Consumer me) {
  const uint64_t dy_base = panel_descriptor<C>(shared.rows(0, me.group));
  const uint64_t x_base = panel_descriptor<C>(shared.columns(0, 0));
  float product[C::kFragment];
  GroupSum<C> sum{shared.sums(me.group, 32 * me.warp + me.lane), {}};
  const bool follows = args.staggered && me.group > 0;
  int add = 0;  // whether the next product is added: not at a sample's beginning

  Ring<C::kStages> ring;
  // The product of the last `steps` times 16 tokens of a stage; what comes before them is zeros. `steps` is a constant:
  // with a condition between two wgmmas the compiler makes a group of each.
  const auto multiply = [&](int stage, auto steps) {
    if (follows) mbarrier_wait(shared.led(stage), ring.parity);
    const uint64_t dy = dy_base + stage * (C::kRowPanels * C::kPanelBytes >> 4);
    const uint64_t x = x_base + stage * (C::kColumnPanels * C::kPanelBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int step = C::kSteps - steps.value; step < C::kSteps; ++step) {
      Wgmma<C::kType, C::kColumns, kMnMajor>::multiply(product, dy + step * kDescriptorStep, x + step * kDescriptorStep,
                                                       add);
      add = 1;
    }
    wgmma_commit();
  };

  float ended_sq = 0.0f;  // of the sample that ended last, and where its sum over the threads goes, or null
  float* ended_out = nullptr;
  Fragment in{0, 0, args.d_out, args.d_in};
  int tile = -1;  // where `in` is
  // Loops within loops, not one with conditions: for a wait under a condition the compiler serialises the products, and
  // for a sum that is set to zero under one it keeps two copies, the second in local memory.
  while (true) {  // a group
    // The product too, although the first one overwrites it: so its registers are free while a group is finished.
#pragma unroll
    for (int i = 0; i < C::kFragment; ++i) product[i] = 0.0f;
    sum.clear();
    Tag tag;
    do {  // a segment
      int stage = ring.stage;
      mbarrier_wait(shared.full(stage), ring.parity);
      tag = shared.load_tag(stage);
      if (tag.flags & kExit) {
        me.store_sum(shared, ended_sq, ended_out);
        return;
      }
      with_constant<C::kSteps>(tag.steps, [&](auto steps) { multiply(stage, steps); });
      ring.advance();
      // The sums over threads of the sample before are made while the tensor cores are busy with this one.
      me.store_sum(shared, ended_sq, ended_out);
      ended_out = nullptr;
      for (int k_tile = 1; k_tile < tag.k_tiles; ++k_tile) {
        const int behind = stage;
        stage = ring.stage;
        mbarrier_wait(shared.full(stage), ring.parity);
        multiply(stage, std::integral_constant<int, C::kSteps>());
        ring.advance();
        wgmma_wait<1>();
        me.release(shared, behind);
      }
      wgmma_wait<0>();
      wgmma_results(product);
      me.release(shared, stage);
      if (tag.flags & kSampleEnds) {
        if (tag.tile != tile) {
          const TilePlace place = place_in<C>(grid, tag.tile / C::kCluster, tag.tile % C::kCluster);
          in = fragment_of<C>(args, place, me);
        }
        tile = tag.tile;
        if (tag.sample >= 0) {
          ended_sq = in.sum_of_squares(product);
          ended_out = args.sample_sq + (int64_t{2} * tag.tile + me.group) * args.samples + tag.sample;
        }
        sum.add(product);
        add = 0;
      }
    } while (!(tag.flags & kGroupEnds));
    if constexpr (C::kHeld == C::kFragment) {
      finish_group(args, shared, me, tag, in, sum.held);
    } else {  // the product is not needed any more
      sum.copy(product);
      finish_group(args, shared, me, tag, in, product);
    }
  }
}

// A block's shared memory stays until no other block of the cluster copies or arrives there any more. Threads that have
// ended count as arrived. Each role calls it by itself: with one barrier behind both, the compiler takes the producer's
// loop for one that threads diverge in, and without uniform registers it needs more others than it has.
template <typename C>
__device__ __forceinline__ void leave_cluster() {
  if constexpr (C::kCluster > 1) cluster_sync();
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    wgrad_norm_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap dy_map,
                      const __grid_constant__ WgradNorm args, const __grid_constant__ WorkGrid grid) {
  const Shared<C> shared{(shared_base() + 1023) / 1024 * 1024};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), 4 * kConsumers * C::kCluster);
      mbarrier_init(shared.led(stage), 4);
    }
    mbarrier_init_fence();
  }
  if constexpr (C::kCluster > 1) {
    cluster_sync();
  } else {
    sync_block();
  }
  const int warp = warp_uniform(static_cast<int>(threadIdx.x) / 32);
  if (warp < 4) {
    registers_release<C::kProducerRegisters>();
    if (threadIdx.x != 0) return;
    produce<C>(&x_map, &dy_map, args, grid, shared);
    leave_cluster<C>();
  } else {
    registers_acquire<C::kConsumerRegisters>();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    consume<C>(args, grid, shared, Consumer{warp / 4 - 1, warp % 4, lane});
    leave_cluster<C>();
  }
}

}  // namespace gradnorm::sm90
