// The kernel for any processor: vectors of 16 bytes (SSE2, NEON), which the compiler makes of what there is.
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#define TILE_VECTORS 2
#define RUNNING_IN_REGISTERS 0
#include "kernel_impl.h"

const gradnorm::cpu::Kernel gradnorm::cpu::kernel_generic = kKernel;
