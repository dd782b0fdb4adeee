// What the producer and the consumers of the sm_90a wgrad share: the tile, its shared memory, and the descriptors that
// tell the tensor cores how operands lie there. Section numbers are those of the PTX ISA, version 9.0.
#pragma once

#include "sm90_ptx.cuh"

namespace gradnorm::sm90 {

constexpr int kTileRows = 128;  // of d_out
constexpr int kConsumers = 2;   // warpgroups, 64 rows each
constexpr int kThreads = 128 * (1 + kConsumers);

// An operand in shared memory is panels of 64 columns (M or N) by the tokens (K) of a K tile, 128 bytes a token, as the
// copy engine writes a box under its 128-byte swizzle: 16-byte chunk c of token k lies at chunk c ^ (k % 8).
constexpr int kPanelColumns = 64;
constexpr int kStepTokens = 16;  // of one wgmma

// 9.7.15.5.1.2.2, the matrix descriptor: bits 0-13 the start address, 16-29 the leading dimension's offset, 32-45 the
// stride dimension's, all in units of 16 bytes; 49-51 the base offset; 62-63 the swizzle, 1 for 128 bytes. In an
// MN-major operand under that swizzle the leading offset leads from 64 columns to the next 64, here one panel
// (9.7.15.5.1.2.1.1), and the stride offset from 8 tokens to the next 8, 1024 bytes (9.7.15.5.1.2.1.2; 1.3 has both as
// a layout, ((8,8,m),(8,k)):((1,8,LBO),(64,SBO)) for 2-byte elements). The swizzle works on address bits (4-6 ^= 7-9):
// panels start at multiples of 1024 bytes, the base offset is 0, and the next 16 tokens are 2048 bytes further on.
template <typename C>
__device__ __forceinline__ uint64_t panel_descriptor(SharedAddress panel) {
  constexpr uint64_t kLeading = C::kPanelBytes >> 4;
  constexpr uint64_t kStride = 1024 >> 4;
  constexpr uint64_t kSwizzle128 = 1;
  return (panel & 0x3FFFF) >> 4 | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}
constexpr uint64_t kDescriptorStep = kStepTokens * 128 >> 4;
constexpr int kMnMajor = 1;  // 9.7.15.5.1.2: imm-trans is 1 where M or N is contiguous

// What a segment is and what ends with it. Written with its first stage.
struct Tag {
  int flags;
  int sample;     // -1: not measured
  int sum_index;  // the group, or if kStored the index in `workspace`
  int tile;
  int k_tiles;  // stages
  int steps;   // of 16 tokens at the end of the first stage; the others are full
};
enum Flag : int {
  kSampleEnds = 1,
  kGroupEnds = 2,
  kFirstGroup = 4,  // the first and the last group of this tile
  kLastGroup = 8,
  kStored = 16,  // sums go to `workspace`
  kExit = 32,
};

// A type of operands, a tile of tiles.h, and the blocks of a cluster: 1, or 2 that take tiles below each other and load
// half of the panels of x for both.
template <int kType_, int kColumns_, int kTokens_, int kStages_, int kSharedSum_, int kCluster_>
struct Config {
  static constexpr int kType = kType_;
  static constexpr int kColumns = kColumns_;  // of d_in
  static constexpr int kTokens = kTokens_;    // of a K tile
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kSteps = kTokens / kStepTokens;
  static constexpr int kPanelBytes = kPanelColumns * kTokens * 2;
  static_assert(kPanelBytes % 1024 == 0, "the swizzle repeats every 1024 bytes");
  static constexpr int kRowPanels = kTileRows / kPanelColumns;
  static constexpr int kColumnPanels = kColumns / kPanelColumns;
  static constexpr int kStageBytes = (kRowPanels + kColumnPanels) * kPanelBytes;
  static_assert(kStageBytes < 1 << 20, "an mbarrier counts no more bytes");
  static constexpr int kFragment = kColumns / 2;              // accumulators a thread
  static constexpr int kHeld = (kColumns - kSharedSum_) / 2;  // of the group's sum in registers
  static_assert((kFragment - kHeld) % 4 == 0, "the rest is read and written four elements at a time");

  // Registers a thread: 168 of 65536 at the start, in steps of 8; then 128 x 40 + 256 x 232, or 128 x 24 + 256 x 240
  // for a product of 128 registers, with which 232 do not suffice. setmaxnreg shares out what the launch took and waits
  // for more: a build that starts with fewer than 168 would hang (test_sm90_sass.py).
  static constexpr int kProducerRegisters = kFragment < 128 ? 40 : 24;
  static constexpr int kConsumerRegisters = kFragment < 128 ? 232 : 240;
  static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= kThreads * (65536 / kThreads / 8 * 8));
};

// Shared memory, from a multiple of 1024 bytes on.
template <typename C>
struct Shared {
  SharedAddress base;

  static constexpr int kColumnsAt = C::kStages * C::kRowPanels * C::kPanelBytes;
  static constexpr int kTagsAt = C::kStages * C::kStageBytes;
  static constexpr int kBarriersAt = kTagsAt + C::kStages * 32;
  static constexpr int kNormsAt = kBarriersAt + C::kStages * 32;
  static constexpr int kSumsAt = kNormsAt + kConsumers * 32;
  static constexpr int kSumStride = kConsumers * 128 * 16;  // from four elements of every thread to the next four
  static constexpr int kSumBytes = (C::kFragment - C::kHeld) / 4 * kSumStride;
  static constexpr int kBytes = kSumsAt + kSumBytes + 1024;  // 1024: for base to be a multiple of it
  static_assert(kSumsAt % 16 == 0);
  static_assert(kBytes <= 227 * 1024, "a block has no more");

  __device__ __forceinline__ SharedAddress rows(int stage, int panel) const {
    return base + (stage * C::kRowPanels + panel) * C::kPanelBytes;
  }
  __device__ __forceinline__ SharedAddress columns(int stage, int panel) const {
    return base + kColumnsAt + (stage * C::kColumnPanels + panel) * C::kPanelBytes;
  }
  // A stage's copies have landed; its products have been made, by both consumers of every block of the cluster; by the
  // first of this one.
  __device__ __forceinline__ SharedAddress full(int stage) const { return base + kBarriersAt + stage * 32; }
  __device__ __forceinline__ SharedAddress empty(int stage) const { return base + kBarriersAt + stage * 32 + 8; }
  __device__ __forceinline__ SharedAddress led(int stage) const { return base + kBarriersAt + stage * 32 + 16; }
  // A consumer's sums of squares, one a warp; two sets, used in turn.
  __device__ __forceinline__ SharedAddress norms(int consumer, int turn) const {
    return base + kNormsAt + (consumer * 2 + turn) * 16;
  }
  // The first four elements of a thread's group sum that are not in registers; the next four are kSumStride further on.
  __device__ __forceinline__ SharedAddress sums(int consumer, int thread) const {
    return base + kSumsAt + (consumer * 128 + thread) * 16;
  }

  __device__ __forceinline__ void store_tag(int stage, const Tag& tag) const {
    const SharedAddress at = base + kTagsAt + stage * 32;
    store_shared_int4(at, make_int4(tag.flags, tag.sample, tag.sum_index, tag.tile));
    store_shared_int4(at + 16, make_int4(tag.k_tiles, tag.steps, 0, 0));
  }
  __device__ __forceinline__ Tag load_tag(int stage) const {
    const SharedAddress at = base + kTagsAt + stage * 32;
    const int4 first = load_shared_int4(at);
    const int4 second = load_shared_int4(at + 16);
    return {first.x, first.y, first.z, first.w, second.x, second.y};
  }
};

// The stage that is used next, and the parity of its round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace gradnorm::sm90
