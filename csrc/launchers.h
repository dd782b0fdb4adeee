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

// The CPU launcher: sums of per-sample gradients dy_t x_t^T over segments of tokens, and their squared norms. Segments
// are in the order of their tokens, none is empty, those of a group lie together. Memory is the host's.
struct SegmentedWgrad {
  const void* x;      // [tokens, d_in], rows x_stride elements apart
  const void* dy;     // [tokens, d_out], rows dy_stride elements apart
  int64_t x_stride, dy_stride;
  int type;           // any Type
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
  void* workspace;    // segmented_wgrad_workspace() bytes
  int isa;            // position in BuildInfo::cpu_isas
  int threads;        // at most so many; the result does not depend on it
};
void segmented_wgrad(const SegmentedWgrad& args);
int64_t segmented_wgrad_workspace(int isa, int64_t tokens, int64_t d_in, int64_t d_out);
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
  float* sample_sq;    // [rows, samples] sums of squares per tile, zeroed by the caller
  float* group_sq;     // [rows, groups] the same of the groups' sums, zeroed by the caller; null with workspace
  float* workspace;    // [splits + groups - 1, d_out, d_in] or null: the sum of group g in split p goes to p + g, unique
                       // because both ascend along the segments; zeroed by the caller. Needed if splits > 1
  void* weight_grad;   // [d_out, d_in] in the type of x, or null; null with workspace
  float* running;      // [d_out, d_in] workspace for weight_grad of more than one group; else null
  int block_n;         // columns of d_in per tile, one of tiles.h
  int group_m;         // rows of tiles walked together, for the L2 cache
  bool staggered;      // sm90: a block's second consumer stays a stage behind the first; changes no result
  int multiprocessors; // blocks of a persistent grid
};
void wgrad_norm_sm80(const WgradNorm& args, void* stream);
void wgrad_norm_sm90(const WgradNorm& args, void* stream);
// Rows of sample_sq and group_sq that a launch writes: tiles of the weight, times the parts that a tile's squares are summed in.
int64_t wgrad_norm_sm80_rows(int d_in, int d_out, int block_n);
int64_t wgrad_norm_sm90_rows(int d_in, int d_out, int block_n);

constexpr int kGramTile = 64;  // tokens at a side of a Gram tile

// Tokens are counted in the order of their samples: token t is row token_row[t] of x and dy and belongs to the sample of
// rank token_rank[t]; ranks ascend. Behind the last token that takes part both are -1.
struct Gram {
  const void* x;   // [rows, d_in], rows x_stride elements apart
  const void* dy;  // [rows, d_out], rows dy_stride elements apart
  int64_t x_stride, dy_stride;
  int type;        // kBFloat16 or kFloat16
  int tokens, d_in, d_out;
  const int32_t* token_row;   // [tokens]
  const int32_t* token_rank;  // [tokens]
  int reach;       // tiles of columns from the diagonal on that a tile of rows is paired with
  bool pairwise;   // all pairs of samples; else each with itself
  int partials;    // partial sums per side: tiles + ranks
  float* partial;  // pairwise: [partials, partials], on and right of the diagonal tile; else [partials, reach]: a sample's
                   // tokens in a tile of rows with its tokens in a tile of columns; zeroed by the caller
};
void gram_sm80(const Gram& args, void* stream);

// Results in fp64, in a fixed order of summation.
// out[c] = sum over r of partial[r, c]
struct ColumnSums {
  const float* partial;  // [rows, columns]
  int64_t rows;
  int columns;
  double* out;           // [columns]
};
void column_sums(const ColumnSums& args, void* stream);

// out[rank_sample[r]] = ||G||^2 (pairwise: out[rank_sample[r], rank_sample[s]] = <G, G'>) from what gram_sm80 left.
struct GramSums {
  const float* partial;        // as in Gram
  const int32_t* rank_begin;   // [ranks + 1] the first token of each rank; a rank may be empty
  const int32_t* rank_sample;  // [ranks] -1: the rank has no sample
  int ranks, samples, reach, partials;
  bool pairwise;
  double* out;                 // [samples], or [samples, samples]; what no rank names stays as it is
};
void gram_sums(const GramSums& args, void* stream);

// The split-K fix-up: the sums of groups over the splits, their squares, and the sum of all, from what wgrad_norm left in
// `workspace`.
struct SplitFixup {
  const float* workspace;   // [splits + groups - 1, elements]
  int64_t elements;         // d_out d_in
  const int32_t* split_first;  // [groups] the splits that have segments of a group, first and last; first > last: none
  const int32_t* split_last;   // [groups]
  const int32_t* outer;     // [groups] ascending: which outer group a group belongs to
  int groups, outer_groups;
  float* group_sq;          // [rows, groups] sums of squares, rows as split_fixup_rows has them
  float* outer_sq;          // [rows, outer_groups], zeroed by the caller
  float* sums;              // [outer_groups, elements] or null: the outer groups' sums, zeroed by the caller
  int type;                 // of weight_grad
  void* weight_grad;        // [elements] or null: the sum of all
};
int64_t split_fixup_rows(int64_t elements);
void split_fixup(const SplitFixup& args, void* stream);

// out[s] = sum over the tokens of a sample of values[row]; ranks as in GramSums.
struct TokenSums {
  const double* values;        // [rows]
  const int32_t* token_row;    // [tokens]
  const int32_t* rank_begin;   // [ranks + 1]
  const int32_t* rank_sample;  // [ranks]
  int ranks;
  double* out;                 // [samples]
};
void token_sums(const TokenSums& args, void* stream);
#endif

}  // namespace gradnorm
