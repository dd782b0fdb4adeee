// Segmented weight gradient for sm_90a: norms at each sample's and group's end, and the sum, from one pass of
// tensor-core products over all tokens (launchers.h says what goes where, device/sm90_wgrad.cuh how).
#include "device/sm90_launch.cuh"

namespace gradnorm {

int64_t wgrad_norm_sm90_rows(int d_in, int d_out, int block_n) {
  const int64_t tile_rows = (static_cast<int64_t>(d_out) + sm90::kTileRows - 1) / sm90::kTileRows;
  return sm90::kConsumers * tile_rows * ((static_cast<int64_t>(d_in) + block_n - 1) / block_n);
}

void wgrad_norm_sm90(const WgradNorm& args, void* stream) {
  using sm90::require;
  require(args.type == kBFloat16 || args.type == kFloat16, "x and dy must be bfloat16 or float16");
  // The copy engine takes nothing else (cuTensorMapEncodeTiled), and nothing is said of a stride of 0, one row for all
  // tokens: the caller copies such a matrix into padded rows.
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && reinterpret_cast<uintptr_t>(args.dy) % 16 == 0;
  const auto spaced = [](int64_t stride) { return stride > 0 && stride % 8 == 0; };
  require(aligned && (args.tokens == 1 || (spaced(args.x_stride) && spaced(args.dy_stride))),
          "x and dy must start at a multiple of 16 bytes, with rows a positive multiple of 8 elements apart");
  const int64_t tile_rows = (static_cast<int64_t>(args.d_out) + sm90::kTileRows - 1) / sm90::kTileRows;
  require(args.cluster == 1 || args.cluster == 2, "cluster must be 1 or 2 blocks");
  require(tile_rows % args.cluster == 0, "a cluster of 2 takes tiles in pairs, and the number of rows of tiles is odd");
  require(args.whole_rows % args.cluster == 0, "a cluster of 2 takes tiles in pairs, and whole_rows is odd");
  if (const char* wrong = wrong_split(args, tile_rows)) require(false, wrong);
  require(args.multiprocessors >= args.cluster, "a cluster needs as many multiprocessors as it has blocks");
  const bool compiled = args.cluster == 1 ? sm90::start_tile<1>(args, stream) : sm90::start_clusters(args, stream);
  if (compiled) return;
  throw std::runtime_error(std::string(sm90::kName) + ": block_n must be " + columns_of(kSm90WgradTiles));
}

}  // namespace gradnorm
