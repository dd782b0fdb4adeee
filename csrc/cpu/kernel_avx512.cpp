// The kernel for AVX-512: 14 accumulators and 14 running sums, all in registers.
#define VECTOR_BYTES 64
#define TILE_ROWS 7
#define TILE_VECTORS 2
#define RUNNING_IN_REGISTERS 1
#include "kernel_impl.h"

const gradnorm::cpu::Kernel gradnorm::cpu::kernel_avx512 = kKernel;
