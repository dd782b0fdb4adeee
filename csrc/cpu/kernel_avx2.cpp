// The kernel for AVX2 with FMA: 12 accumulators, running sums in memory.
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define RUNNING_IN_REGISTERS 0
#include "kernel_impl.h"

const gradnorm::cpu::Kernel gradnorm::cpu::kernel_avx2 = kKernel;
