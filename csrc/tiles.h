// The tiles that the segmented wgrad kernels are compiled for, each with its reason. Python's choice among them is in
// gradnorm_kernels/tuning/tiles.py; it sees the columns as WGRAD_TILES of the module. A new width on Hopper also needs
// its wgmma instruction in device/sm90_ptx.cuh.
//
// Every tile has 128 rows of d_out and two fp32 accumulators, the sample's gradient and the group's sum. The first is
// in registers, because the tensor cores add there. Where both would not fit, a part of the second is in shared memory.
#pragma once

#include <cstddef>
#include <string>

namespace gradnorm {

struct WgradTile {
  int columns;      // of d_in
  int tokens;       // of a K tile
  int stages;       // K tiles in shared memory
  int shared_sum;   // columns whose group sum is in shared memory; that of the others is in registers
};

// Ampere. 128 columns: 64 accumulators and 64 sums for each of 256 threads. Four stages of 32 tokens are 64 KiB, which
// also GPUs with 99 KiB per block have (8.6, 8.9).
// 192 columns: 96 + 96, so that one set of operands fits the registers, not two. A warp of 64 x 48 reads fewer bytes of
//   shared memory per product than one of 64 x 32: 79% of what its port gives on an A100, where 128 columns take all.
constexpr WgradTile kSm80WgradTiles[] = {{128, 32, 4, 0}, {192, 32, 4, 0}};

// Hopper. Two consumer warpgroups of 64 rows each.
// 128 columns: the least padding of d_in; 64 + 64 registers, and room for seven stages of 32 KiB.
// 192 columns: 96 + 96 registers; fewer bytes from L2 per product, and 704 tiles instead of 1024 at 4096 x 4096; five
//   stages of 40 KiB.
// 256 columns: the fewest bytes per product, and 512 tiles at 4096 x 4096. 128 registers of products and 64 of the sum,
//   whose other half takes 64 KiB of shared memory. That leaves room for six stages of 32 tokens, 24 KiB each, or three
//   of 64: then copies run 128 tokens ahead instead of 160, and in a model of the pipeline ends of samples cost more.
constexpr WgradTile kSm90WgradTiles[] = {{128, 64, 7, 0}, {192, 64, 5, 0}, {256, 32, 6, 128}};

// "128 or 192": the columns, for messages.
template <size_t kCount>
std::string columns_of(const WgradTile (&tiles)[kCount]) {
  std::string text;
  for (const WgradTile& tile : tiles) text += (text.empty() ? "" : " or ") + std::to_string(tile.columns);
  return text;
}

}  // namespace gradnorm
