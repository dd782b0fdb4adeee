// Segmented weight gradient for sm_90a: norms at each sample's and group's end, and the sum, from one pass of
// tensor-core products over all tokens (launchers.h says what goes where, device/sm90_wgrad.cuh how).
//
// Left out until it can be measured on a GPU: clusters of blocks with multicast copies.
#include <utility>

#include "device/launch.cuh"
#include "device/sm90_encode.cuh"
#include "device/sm90_wgrad.cuh"
#include "tiles.h"

namespace gradnorm {
namespace {

constexpr char kName[] = "wgrad_norm_sm90";

// The map of a matrix [tokens, columns] in which a box of box_rows rows can hold fewer rows. Element (c, r, b) of the map is
// element c of row b + r, for 0 <= r < box_rows. The box at (c, n - box_rows, row) begins below r = 0, with zeros; then,
// from r = 0 to the end of the box, come the n rows from `row` on. Of a neighbour's rows not one is read, whatever they
// hold, and one map serves all samples. Coordinates of loads may be negative (CUDA Programming Guide).
//
// The address is the matrix's own: with one box_rows rows before it the zeros could come last, but loads through such a
// map are reported to fault where that memory is not mapped. All that is asked for lies in the matrix: row + r < row + n.
// That the last r of the last b would not is allowed: cuTensorMapEncodeTiled knows of no allocation, and the maps through
// which QuACK (create_ragged_tensor_for_tma, ptr_shift=False) and Triton (tools/ragged_tma.py) load ragged rows declare
// 2^30 rows of every matrix.
TensorMap ragged_map(const void* matrix, int64_t stride, int tokens, int columns, int type, int box_rows) {
  // A single row has no next one, so its stride may be one that is not allowed: then rows are as if they touched.
  const uint64_t row_bytes = tokens == 1 ? (static_cast<uint64_t>(columns) * 2 + 15) / 16 * 16 : stride * uint64_t{2};
  const uint64_t sizes[3] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(box_rows), static_cast<uint64_t>(tokens)};
  const uint64_t strides[2] = {row_bytes, row_bytes};
  const uint32_t box[3] = {sm90::kPanelColumns, static_cast<uint32_t>(box_rows), 1};
  return encode_tensor_map(matrix, type, sizes, strides, box, kName);
}

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string(kName) + ": " + what);
}

template <typename C>
void start(const WgradNorm& args, void* stream) {
  const int64_t work_tiles = wgrad_norm_sm90_rows(args.d_in, args.d_out, C::kColumns) / sm90::kConsumers * args.splits;
  require(work_tiles <= 0x7fffffff, "more tiles than a 32-bit number counts");
  const int64_t blocks = work_tiles < args.multiprocessors ? work_tiles : args.multiprocessors;
  launch(kName, sm90::wgrad_norm_kernel<C>, blocks, sm90::kThreads, sm90::Shared<C>::kBytes, stream,
         ragged_map(args.x, args.x_stride, args.tokens, args.d_in, args.type, C::kTokens),
         ragged_map(args.dy, args.dy_stride, args.tokens, args.d_out, args.type, C::kTokens), args);
}

constexpr int kTiles = sizeof(kSm90WgradTiles) / sizeof(kSm90WgradTiles[0]);

// Launches the tile at this position of tiles.h if its columns are args.block_n. False if not.
template <int kType, size_t kIndex>
bool start_if(const WgradNorm& args, void* stream) {
  constexpr WgradTile kTile = kSm90WgradTiles[kIndex];
  if (args.block_n != kTile.columns) return false;
  start<sm90::Config<kType, kTile.columns, kTile.tokens, kTile.stages, kTile.shared_sum>>(args, stream);
  return true;
}

template <int kType, size_t... kIndex>
bool start_tile(const WgradNorm& args, void* stream, std::index_sequence<kIndex...>) {
  return (start_if<kType, kIndex>(args, stream) || ...);
}

}  // namespace

int64_t wgrad_norm_sm90_rows(int d_in, int d_out, int block_n) {
  const int64_t tile_rows = (static_cast<int64_t>(d_out) + sm90::kTileRows - 1) / sm90::kTileRows;
  return sm90::kConsumers * tile_rows * ((static_cast<int64_t>(d_in) + block_n - 1) / block_n);
}

void wgrad_norm_sm90(const WgradNorm& args, void* stream) {
  require(args.type == kBFloat16 || args.type == kFloat16, "x and dy must be bfloat16 or float16");
  // The copy engine takes nothing else (cuTensorMapEncodeTiled), and nothing is said of a stride of 0, one row for all
  // tokens: the caller copies such a matrix into padded rows.
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && reinterpret_cast<uintptr_t>(args.dy) % 16 == 0;
  const auto spaced = [](int64_t stride) { return stride > 0 && stride % 8 == 0; };
  require(aligned && (args.tokens == 1 || (spaced(args.x_stride) && spaced(args.dy_stride))),
          "x and dy must start at a multiple of 16 bytes, with rows a positive multiple of 8 elements apart");
  const auto tiles = std::make_index_sequence<kTiles>();
  const bool compiled = args.type == kBFloat16 ? start_tile<kBFloat16>(args, stream, tiles)
                                               : start_tile<kFloat16>(args, stream, tiles);
  if (!compiled) throw std::runtime_error(std::string(kName) + ": block_n must be " + columns_of(kSm90WgradTiles));
}

}  // namespace gradnorm
