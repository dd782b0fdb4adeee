// Making the schedule of schedule.h.
#include "schedule.h"

#include <algorithm>

namespace gradnorm::cpu {

namespace {

constexpr int64_t kFewestTokens = 256;
// Floats that the packed rows of a phase take at most, if it has more than the fewest tokens.
constexpr int64_t kPackedFloats = 2 << 20;

// Where the phase that starts at `first` ends: at a segment's end if one lies in the second half of what it may take,
// so that few gradients cross from phase to phase unfinished; else so that the phases left are equal.
int64_t phase_end(const SegmentedWgrad& call, int64_t first, int64_t limit) {
  const int64_t left = call.tokens - first;
  if (left <= limit) return call.tokens;
  const int64_t* const begin = call.ends;
  const int64_t* const after = std::upper_bound(begin, begin + call.segments, first + limit);
  if (after != begin && after[-1] > first + limit / 2) return after[-1];
  const int64_t phases = (left + limit - 1) / limit;
  return first + (left + phases - 1) / phases;
}

}  // namespace

int64_t most_tokens(int64_t d_in, int64_t d_out) {
  return std::clamp(kPackedFloats / (d_in + d_out), kFewestTokens, kMostTokens);
}

Schedule make_schedule(const SegmentedWgrad& call, int64_t limit) {
  Schedule made;
  const auto group_of = [&](int64_t segment) { return segment < call.segments ? call.groups[segment] : -1; };
  int64_t at = 0, segment = 0;
  bool open = false, fresh = true;
  while (at < call.tokens) {
    Phase phase;
    phase.first = at;
    phase.block = static_cast<int>(made.blocks.size());
    const int64_t end = phase_end(call, at, limit);
    phase.tokens = end - at;
    while (at < end) {
      Block block;
      block.first = at - phase.first;
      block.part = static_cast<int>(made.parts.size());
      block.group = group_of(segment);
      block.open_in = open;
      block.fresh = fresh;
      block.alone = (segment == 0 || group_of(segment - 1) != block.group) && group_of(segment + 1) != block.group;
      do {
        const int64_t stop = std::min(call.ends[segment], end);
        open = stop < call.ends[segment];
        SegmentPart part{static_cast<int32_t>(stop - at), -1, !open};
        at = stop;
        if (!open) {
          if (call.samples[segment] >= 0) {
            part.square = static_cast<int32_t>(phase.targets.size());
            phase.targets.push_back(call.sample_sq + call.samples[segment]);
          }
          ++segment;
          fresh = false;
        }
        made.parts.push_back(part);
      } while (at < end && group_of(segment) == block.group);
      block.parts = static_cast<int>(made.parts.size()) - block.part;
      block.ends = !open && group_of(segment) != block.group;
      block.group_square = -1;
      if (block.ends) {
        block.group_square = static_cast<int>(phase.targets.size());
        phase.targets.push_back(call.group_sq + block.group);
        fresh = true;
      }
      made.blocks.push_back(block);
    }
    phase.blocks = static_cast<int>(made.blocks.size()) - phase.block;
    made.phases.push_back(std::move(phase));
  }
  return made;
}

}  // namespace gradnorm::cpu
