// How the sm_90a wgrad is launched: the tensor maps of its operands, and the kernel of a tile. Kernels without and with
// clusters are compiled in files of their own, side by side.
#pragma once

#include <utility>

#include "../tiles.h"
#include "launch.cuh"
#include "sm90_encode.cuh"
#include "sm90_wgrad.cuh"

namespace gradnorm::sm90 {

inline constexpr char kName[] = "wgrad_norm_sm90";

// The map of a matrix [tokens, columns] in which a box of box_rows rows can hold fewer rows. Element (c, r, b) of the
// map is element c of row b + r, for 0 <= r < box_rows. The box at (c, n - box_rows, row) begins below r = 0, with
// zeros; then, from r = 0 to the end of the box, come the n rows from `row` on. Of a neighbour's rows not one is read,
// whatever they hold, and one map serves all samples. Coordinates of loads may be negative (CUDA Programming Guide).
//
// The address is the matrix's own: with one box_rows rows before it the zeros could come last, but loads through such a
// map are reported to fault where that memory is not mapped. All that is asked for lies in the matrix: row + r < row +
// n. That the last r of the last b would not is allowed: cuTensorMapEncodeTiled knows of no allocation, and the maps
// through which QuACK (create_ragged_tensor_for_tma, ptr_shift=False) and Triton (tools/ragged_tma.py) load ragged rows
// declare 2^30 rows of every matrix.
inline TensorMap ragged_map(const void* matrix, int64_t stride, int tokens, int columns, int type, int box_rows) {
  // A single row has no next one, so its stride may be one that is not allowed: then rows are as if they touched.
  const uint64_t row_bytes = tokens == 1 ? (static_cast<uint64_t>(columns) * 2 + 15) / 16 * 16 : stride * uint64_t{2};
  const uint64_t sizes[3] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(box_rows),
                             static_cast<uint64_t>(tokens)};
  const uint64_t strides[2] = {row_bytes, row_bytes};
  const uint32_t box[3] = {kPanelColumns, static_cast<uint32_t>(box_rows), 1};
  return encode_tensor_map(matrix, type, sizes, strides, box, kName);
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string(kName) + ": " + what);
}

template <typename C>
void start(const WgradNorm& args, void* stream) {
  const WorkGrid grid = grid_of<C>(args);
  const int64_t tiles = grid.items() * C::kCluster;
  require(tiles <= 0x7fffffff, "more tiles than a 32-bit number counts");
  const int64_t room = args.multiprocessors / C::kCluster * C::kCluster;
  const int64_t blocks = tiles < room ? tiles : room;
  launch_clusters(kName, wgrad_norm_kernel<C>, blocks, C::kCluster, kThreads, Shared<C>::kBytes, stream,
                  ragged_map(args.x, args.x_stride, args.tokens, args.d_in, args.type, C::kTokens),
                  ragged_map(args.dy, args.dy_stride, args.tokens, args.d_out, args.type, C::kTokens), args, grid);
}

// Launches the tile of this position in tiles.h if its columns are args.block_n, in clusters of kCluster blocks. False
// if not.
template <int kType, int kCluster, size_t kIndex>
bool start_if(const WgradNorm& args, void* stream) {
  constexpr WgradTile kTile = kSm90WgradTiles[kIndex];
  if (args.block_n != kTile.columns) return false;
  start<Config<kType, kTile.columns, kTile.tokens, kTile.stages, kTile.shared_sum, kCluster>>(args, stream);
  return true;
}

template <int kType, int kCluster, size_t... kIndex>
bool start_typed(const WgradNorm& args, void* stream, std::index_sequence<kIndex...>) {
  return (start_if<kType, kCluster, kIndex>(args, stream) || ...);
}

// The same whatever the tile. False if none has these columns.
template <int kCluster>
bool start_tile(const WgradNorm& args, void* stream) {
  const auto tiles = std::make_index_sequence<sizeof(kSm90WgradTiles) / sizeof(kSm90WgradTiles[0])>();
  if (args.type == kBFloat16) return start_typed<kBFloat16, kCluster>(args, stream, tiles);
  return start_typed<kFloat16, kCluster>(args, stream, tiles);
}

// In wgrad_norm_sm90_clusters.cu: start_tile<2>.
bool start_clusters(const WgradNorm& args, void* stream);

}  // namespace gradnorm::sm90
