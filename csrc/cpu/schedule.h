// In which order the tokens of a call are taken: phases of tokens that are packed together, cut in blocks of one group,
// cut in parts of one segment.
#pragma once

#include <cstdint>
#include <vector>

#include "../launchers.h"
#include "kernel.h"

namespace gradnorm::cpu {

constexpr int64_t kMostTokens = 512;

// Tokens of a phase that belong to one group.
struct Block {
  int64_t first;     // token, from the phase's start
  int part, parts;   // its parts of segments
  int64_t group;     // the position of the group's sum
  bool open_in;      // the first part's segment began in an earlier block
  bool fresh;        // no segment of the group has ended before
  bool alone;        // the group is one segment: its gradient, also an unfinished one, may lie where the sum goes
  bool ends;         // the group ends here
  int group_square;  // then the partial sum of its squares, else -1
};

struct Phase {
  int64_t first, tokens;
  int block, blocks;
  std::vector<double*> targets;  // where each partial sum of squares is added
};

struct Schedule {
  std::vector<Phase> phases;
  std::vector<Block> blocks;
  std::vector<SegmentPart> parts;
};

// The most tokens of a phase.
int64_t most_tokens(int64_t d_in, int64_t d_out);

// The most partial sums of a phase: every token may end a sample and a group.
constexpr int64_t most_partials(int64_t tokens) { return 2 * tokens; }

// `limit`: the most tokens of a phase.
Schedule make_schedule(const SegmentedWgrad& call, int64_t limit);

}  // namespace gradnorm::cpu
