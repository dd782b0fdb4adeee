// The tiles that the segmented wgrad kernels are compiled for, each with its reason. Python's choice among them is in
// gradnorm_kernels/tuning/tiles.py; it sees the columns as WGRAD_TILES of the module. A new width on Hopper also needs
// its wgmma instruction in device/sm90_ptx.cuh and in the host's overlay of that file.
//
// Every tile has 128 rows of d_out. Two fp32 accumulators per tile, the sample's gradient and the group's sum, must fit
// the registers, so that a tile is half as large as a plain GEMM's.
#pragma once

namespace gradnorm {

struct WgradTile {
  int columns;  // of d_in
  int tokens;   // of a K tile
  int stages;   // K tiles in shared memory
};

// Ampere. 128 columns: 64 accumulators and 64 sums for each of 256 threads. Four stages of 32 tokens are 64 KiB, which
// also GPUs with 99 KiB per block have (8.6, 8.9).
constexpr WgradTile kSm80WgradTiles[] = {{128, 32, 4}};

// Hopper. Two consumer warpgroups of 64 rows each, K tiles of 64 tokens, as one swizzled box of the copy engine holds.
// 128 columns: the least padding of d_in; 64 + 64 registers, and room for seven stages of 32 KiB.
// 192 columns: 96 + 96 registers; fewer bytes from L2 per product, and 704 tiles instead of 1024 at 4096 x 4096; five
//   stages of 40 KiB.
constexpr WgradTile kSm90WgradTiles[] = {{128, 64, 7}, {192, 64, 5}};

}  // namespace gradnorm
