"""Parts of the wgrad kernels: sums of squares, and inner products of the groups' sums.

The inner products are those of up to PRODUCT_GROUPS groups, for LANES, the next power of two. A chunk of every group's
sum is copied to shared memory, and each thread multiplies elements of all pairs: no thread waits for a sum over the
others before the last chunk. The sums of more groups are stored, and multiplied by torch (:mod:`.wgrad`).
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The most groups whose inner products the kernels take. An element costs LANES^2 multiplications outside the tensor
#: cores: with 16 lanes at least a quarter of what 16384 tokens cost Hopper's tensor cores (estimated from peak rates).
PRODUCT_GROUPS = 16
# Running sums of products: 64 registers in each of 128 threads, whatever the number of groups.
_PRODUCT_SUMS = 8192


@triton.jit
def add_sum(terms, partial_ptr, fresh):
    """Add the sum of ``terms`` to a partial sum that only this program writes; if ``fresh``, it holds nothing yet."""
    # The load is issued before the sum, which hides its latency.
    before = tl.load(partial_ptr, mask=fresh == 0, other=0.0)
    tl.store(partial_ptr, before + tl.sum(terms).to(tl.float64))


@triton.jit
def thread_squares(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's squares, added up as far as one thread holds them: [BLOCK_M, 8]. No thread waits for another."""
    return tl.sum(tl.reshape(tile * tile, [BLOCK_M, BLOCK_N // 8, 8]), 1)


@triton.jit
def add_pending_squares(squares, sample, partial_ptr, fresh):
    """Add the squares of the sample that ended last to its partial sum; ``sample`` below 0: there is none."""
    if sample >= 0:
        add_sum(squares, partial_ptr + sample, fresh)


@triton.constexpr_function
def _product_columns(lanes: int, size: int) -> int:
    return min(size, _PRODUCT_SUMS // (lanes * lanes))


@triton.jit
def group_products(
    sum_ptr,  # [K, STRIDE] float32: the groups' sums; of groups without rows anything
    product_ptr,  # [K, K] float32, out
    groups,  # K
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    LANES: tl.constexpr,  # a power of two, at least K
):
    """``<S_a, S_b>`` over the first SIZE elements of each pair of sums. A group meets no other's NaN."""
    COLUMNS: tl.constexpr = _product_columns(LANES, SIZE)
    lane = tl.arange(0, LANES)
    present = lane < groups
    element = sum_ptr + lane[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]
    products = tl.zeros([LANES, LANES, COLUMNS], tl.float32)
    tl.debug_barrier()  # other threads of this program stored some of the sums
    # num_stages: copies run ahead, also in a loop without tl.dot.
    for at in tl.range(0, SIZE, COLUMNS, num_stages=4):
        sums = tl.load(element + at, mask=present[:, None], other=0.0)
        products += sums[:, None, :] * sums[None, :, :]
    out = product_ptr + lane[:, None] * groups + lane[None, :]
    tl.store(out, tl.sum(products, 2), mask=present[:, None] & present[None, :])


def product_lanes(groups: int) -> int:
    """The LANES of the inner products of K groups: the next power of two; 0 for one group, and for too many."""
    return 1 << (groups - 1).bit_length() if 1 < groups <= PRODUCT_GROUPS else 0
