// What Python may call, by way of bindings.cpp: raw pointers, sizes, strides and, on a GPU, a stream.
//
// The caller (gradnorm_kernels/backends) has checked every argument and keeps the tensors alive. Matrices are row-major;
// a stride is the number of elements from one row to the next, columns lie next to each other. Element types are named
// by Type. A launcher throws std::runtime_error (RuntimeError in Python), whose text names the launch.
#pragma once

#include <cstdint>

namespace gradnorm {

struct BuildInfo {
  const char* cxx_compiler;   // "GNU 12.2.0"
  const char* cuda_compiler;  // "nvcc 13.0.88", or ""
  const char* cuda_version;   // of the toolkit and the runtime linked in, or ""
  const char* architectures;  // "sm_80,sm_90a", or ""
  const char* cpu_isas;       // "generic,avx2,avx512"
  const char* commit;         // "0123456789ab-dirty", or "" outside a checkout
};
extern const BuildInfo build;

enum Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kMostGramGroups = 32;  // from about here on a GEMM over the kept sums is faster
constexpr int kMostGramSquares = 1024;

// The CPU launcher: sums of per-sample gradients dy_t x_t^T over segments of tokens, and their squared norms. Segments
// are in the order of their tokens, none is empty, those of a group lie together. Memory is the host's.
struct SegmentedWgrad {
  const void* x;      // [tokens, d_in], rows x_stride elements apart
  const void* dy;     // [tokens, d_out], rows dy_stride elements apart
  int64_t x_stride, dy_stride;
  int type;           // any Type
  const int64_t* rows;  // [tokens] the row of x and dy of each token, or null: token t is row t
  int64_t tokens, d_in, d_out;
  const int64_t* ends;    // [segments] the token after a segment's last
  const int64_t* groups;  // [segments] the position of its group's sum, from 0, each the one before or one more
  const int64_t* samples;  // [segments] where in sample_sq its squared norm is added, or -1: not measured
  int64_t segments;
  float* sums;        // [groups, d_out, d_in] the groups' sums if sums_kept, else [1, d_out, d_in]: the last group's
  bool sums_kept;
  float* open;        // [d_out, d_in] workspace
  float* total;       // [d_out, d_in] the sum over the groups, or null
  double* sample_sq;  // [measured segments] added to
  double* group_sq;   // [groups] added to
  double* gram;       // [groups, groups] added to: inner products of the groups' sums; then sums, sums_kept and open are not
                      // used. Null for more than kMostGramGroups groups, or kMostGramSquares measured segments and groups
  void* workspace;    // segmented_wgrad_workspace() bytes
  int isa;            // position in BuildInfo::cpu_isas
  int threads;        // at most so many; the result does not depend on it
};
void segmented_wgrad(const SegmentedWgrad& args);
// `gram_groups`: groups if `gram` is given, else 0. With it all tokens are packed at once. `segments`: as in the call.
int64_t segmented_wgrad_workspace(int isa, int64_t tokens, int64_t d_in, int64_t d_out, int64_t gram_groups,
                                  int64_t segments);
// The instruction set to use on this processor: a position in BuildInfo::cpu_isas.
int best_isa();
// Whether this processor runs the instruction set at a position of BuildInfo::cpu_isas.
bool runs_isa(int isa);

#ifdef GRADNORM_WITH_CUDA
// The newest CUDA that the machine's driver knows: 13020 stands for 13.2; 0: there is no driver.
int driver_version();

// The CUDA launchers. Pointers are to device memory of the current device; a stream is a cudaStream_t (null: the default
// stream). Nothing is allocated, nothing waits for the device, so every launch can be captured in a graph.
//
// Segments in the order of (group, sample), those of a sample in their own order, from ids on the device. Where a value is
// wrong `valid` is 0, the first segment of the table has all rows, and ids are the nearest ones that are in range.
struct SegmentTable {
  const void* offsets;     // [segments + 1] cu_seqlens, or null: `length` rows each
  const void* sample_ids;  // [segments], or null: sample i in segment i
  const void* group_ids;   // [samples], or null: one group
  bool offsets_wide, samples_wide, groups_wide;  // int64, not int32
  int segments, samples, groups;  // at least one of each
  int64_t tokens, length;
  int64_t* start;    // [segments] out, as the next four
  int64_t* end;
  int32_t* sample;
  int32_t* group;
  uint8_t* valid;    // [1]
};
void segment_table(const SegmentTable& args, void* stream);

// The prologue of a call, one block: checks cu_seqlens and makes the tables that the other launches read.
//
// Segments are in the order of (group, sample), and the segments of a sample lie together. Empty ones are left out of every
// table. The plain form has sample i in segment i and one group; its cu_seqlens are checked here. Where values are wrong
// the first segment gets all rows, and `finish` makes every result NaN.
struct Schedule {
  const void* start;      // [segments] int64, the first row; plain: cu_seqlens [segments + 1], or null: `length` rows each
  const int64_t* end;     // [segments] the row after the last one; null: the plain form
  const int32_t* sample;  // [segments]; null in the plain form
  const int32_t* group;   // [segments]; null in the plain form
  const uint8_t* valid;   // [1] whether the values are in range, or null: they are, or they are checked here
  bool wide;              // cu_seqlens are int64, not int32
  int segments, samples, groups, tokens, length;
  int gram_tokens;        // samples of at most so many tokens are for the Gram, the others for wgrad
  int splits;             // of the tokens; 0: no tables for wgrad
  bool anywhere;          // splits end anywhere, and the inner sums are those of samples; else between samples: of groups
  bool stored;            // the groups' squares come from the split-K fix-up
  int inner;              // inner sums: min(samples, segments) if `anywhere`, else groups

  int32_t* workspace;     // [7, segments + 1]
  int32_t* spans;         // [samples, 2] workspace
  int32_t* info;          // [2] out: 1 if all values are in range, else 0; how many tokens are for the Gram
  int32_t* state;         // [samples + groups] out: Source, where the squared norms of samples and groups are found

  // For wgrad, as WgradNorm has them, with room for segments + splits.
  int32_t* segment_start;
  int32_t* segment_end;
  int32_t* segment_sample;
  int32_t* segment_group;  // the inner sum
  int32_t* split_start;    // [splits + 1]
  // For the split-K fix-up, as SplitFixup has them, or null.
  int32_t* split_first;
  int32_t* split_last;
  int32_t* outer;
  int32_t* inner_sample;

  // For the Gram, as Gram and Span have them, or null.
  int32_t* token_row;
  int32_t* sample_rank;
  int32_t* group_rank;
  int32_t* sample_span;  // [samples, 3]
  int32_t* group_span;   // [groups, 3]
};
void schedule(const Schedule& args, void* stream);

// Where a squared norm is found: nowhere (it is 0), in the partial sums of wgrad_norm, of split_fixup, or of gram_sm80.
enum Source : int { kAbsent = 0, kWgrad = 1, kFixup = 2, kGram = 3 };

// Segments are in the order of (group, sample): rows segment_start[i] to segment_end[i] of x and dy, of group
// segment_group[i]. Empty ones are skipped.
struct WgradNorm {
  const void* x;         // [tokens, d_in], rows x_stride elements apart
  const void* dy;        // [tokens, d_out], rows dy_stride elements apart
  int64_t x_stride, dy_stride;
  int type;              // kBFloat16 or kFloat16
  int tokens, d_in, d_out;
  const int32_t* segment_start;   // [segments]
  const int32_t* segment_end;     // [segments]
  const int32_t* segment_sample;  // [segments] the sample that is measured, or -1
  const int32_t* segment_group;   // [segments] ascending
  int segments, samples, groups;
  const int32_t* split_start;  // [splits + 1] split p takes segments split_start[p] to split_start[p + 1]: whole samples
  int splits;
  int whole_rows;      // rows of tiles, from the first on, whose tiles take all segments; those of the others take a split,
                       // and their sums go to `workspace`
  float* sample_sq;    // [rows, samples] sums of squares per tile; of a sample that is not measured nothing is written
  float* group_sq;     // [rows of the whole tiles, groups] the same of the groups' sums; null without whole rows
  float* workspace;    // [splits + groups - 1, d_out - 128 whole_rows, d_in]: the sum of group g in split p goes to p + g,
                       // unique because both ascend along the segments; others stay as they are. Null if all rows are whole
  void* weight_grad;   // [d_out, d_in] in the type of x, or null: the whole rows are written
  float* running;      // [d_out, d_in] workspace for weight_grad of more than one group; else null
  int block_n;         // columns of d_in per tile, one of tiles.h
  int group_m;         // rows of tiles walked together, for the L2 cache
  bool staggered;      // sm90: a block's second consumer stays a stage behind the first; changes no result
  int cluster;         // sm90: blocks of a cluster, 1 or 2; 2 need an even number of rows of tiles; changes no result
  int multiprocessors; // blocks of a persistent grid
};
void wgrad_norm_sm80(const WgradNorm& args, void* stream);
void wgrad_norm_sm90(const WgradNorm& args, void* stream);
// Rows of sample_sq that a launch writes, and of group_sq if all rows of tiles are whole: tiles of the weight, times the parts
// that a tile's squares are summed in. Those of the whole rows come first.
int64_t wgrad_norm_sm80_rows(int d_in, int d_out, int block_n);
int64_t wgrad_norm_sm90_rows(int d_in, int d_out, int block_n);

constexpr int kGramTile = 64;  // tokens at a side of a Gram tile

// Tokens are counted in the order of their samples: token t is row token_row[t] of x and dy and belongs to the sample (or
// group) of rank token_rank[t]; ranks ascend. There are count[0] tokens that take part, at most `tokens`.
struct Gram {
  const void* x;   // [rows, d_in], rows x_stride elements apart
  const void* dy;  // [rows, d_out], rows dy_stride elements apart
  int64_t x_stride, dy_stride;
  int type;        // kBFloat16 or kFloat16
  int tokens, d_in, d_out;
  const int32_t* token_row;   // [tokens]
  const int32_t* token_rank;  // [tokens]
  const int32_t* count;       // [1]
  int reach;       // tiles of columns from the diagonal on that a tile of rows is paired with
  bool pairwise;   // all pairs of samples; else each with itself
  int partials;    // partial sums per side: tiles + ranks
  float* partial;  // pairwise: [partials, partials], on and right of the diagonal tile; else [partials, reach]: a sample's
                   // tokens in a tile of rows with its tokens in a tile of columns; pairs that do not meet stay as they are
};
void gram_sm80(const Gram& args, void* stream);

// The tokens of a sample (or group) in the Gram's order, [begin, end), and its rank.
struct Span {
  int32_t begin, end, rank;
};

// The split-K fix-up: the inner sums over the splits, their squares, the sums of outer groups, and the sum of all, from
// what wgrad_norm left in `workspace`.
struct SplitFixup {
  const float* workspace;      // [splits + inner - 1, elements]
  int64_t elements;            // d_out d_in
  const int32_t* split_start;  // [splits + 1] as in WgradNorm: a split without segments has left nothing
  const int32_t* split_first;  // [inner] the splits that have segments of an inner sum, first and last; first > last: none
  const int32_t* split_last;   // [inner]
  const int32_t* outer;        // [inner] ascending: which group an inner sum belongs to
  const int32_t* inner_sample; // [inner] whose squares an inner sum's are, -1: nobody's; null: inner sums are the groups'
  int inner, samples, groups;
  float* sample_sq;            // [rows, samples] or null: sums of squares, rows as split_fixup_rows has them
  float* group_sq;             // [rows, groups]; groups without inner sums stay as they are
  float* products;             // [rows, groups, groups] or null: inner products of the groups' sums, above the diagonal alone;
                               // then inner sums are the groups', of which there are at most kFixupGroups
  float* sums;                 // [groups, width] or null: the groups' sums, with zeros from `elements` on
  int64_t width;               // at least `elements`
  int type;                    // of weight_grad
  void* weight_grad;           // [elements] or null: the sum of all
};
// With one sum of a chunk per group, a block's shared memory stays below the 99 KiB that every GPU from sm_80 on has.
constexpr int kFixupGroups = 12;
int64_t split_fixup_rows(int64_t width);
void split_fixup(const SplitFixup& args, void* stream);

// The epilogue of a call, or of one of its passes over rows of the weight: squared norms and inner products in fp64, in a
// fixed order of summation; NaN if values were out of range.
struct Finish {
  const int32_t* state;  // [samples + groups] Source
  const int32_t* info;   // [1] 0: values were out of range
  int samples, groups;

  // kWgrad and kFixup: [rows, samples] and [rows, groups] each. A group's kFixup is added to the partial sums of wgrad's whole
  // rows of tiles, which are null where there are none.
  const float* wgrad_samples;
  const float* wgrad_groups;
  int64_t wgrad_rows, wgrad_group_rows;
  const float* fixup_samples;
  const float* fixup_groups;
  int64_t fixup_rows;

  // kGram: what gram_sm80 left of all rows of the weight. Spans are [samples] and [groups].
  const float* gram_samples;
  const int32_t* sample_span;
  int sample_reach;
  const float* gram_groups;
  const int32_t* group_span;
  int group_reach;

  // Inner products of groups: what gram_sm80 left pairwise [partials, partials], or products [slabs, groups, groups] of
  // the groups' sums, of which those above the diagonal are read; null where there is neither.
  const float* pairs;
  int partials;
  const float* products;
  int slabs;

  bool first, last;     // the results hold nothing yet; nothing will be added to them
  double* sample_sq;    // [samples]
  double* group_sq;     // [groups]
  double* group_gram;   // [groups, groups] or null; its diagonal is group_sq
  void* weight_grad;    // [d_out, d_in] or null: its first row becomes NaN if values were out of range
  int d_in;
};
void finish(const Finish& args, void* stream);

// out[s] = sum over the tokens of a sample of values[row]; NaN if values were out of range.
struct TokenSums {
  const double* values;        // [rows]
  const int32_t* token_row;    // as in Gram
  const int32_t* sample_span;  // [samples] Span
  const int32_t* info;         // as in Finish
  int samples;
  double* out;                 // [samples]
};
void token_sums(const TokenSums& args, void* stream);
#endif

}  // namespace gradnorm
