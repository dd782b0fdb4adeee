"""What the launches of Triton kernels share: the current device, the config, rows that are read without masks."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from ...segments import rows
from ...tuning import costs, tiles
from ...tuning.tiles import KernelConfig

_INT32_MAX = (1 << 31) - 1
#: Whether Triton forgets the fence between copies to shared memory by cp.async and tensor cores that read it by another
#: way (wgmma and tcgen05, by the async proxy): before 3.7.1, its pull request 10537 and PyTorch's issue 181248.
UNFENCED = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3]) < (3, 7, 1)


@constexpr_function
def needs_fence(element: tl.dtype, first: int, end: int) -> bool:
    """Whether it is forgotten for products of ``element`` on the current GPU, of compute capability [first, end)."""
    if not UNFENCED or element.primitive_bitwidth > 16:
        return False
    geq = tl.target_info.cuda_capability_geq
    return geq(first) and not geq(end)


@constexpr_function
def copies_ahead(element: tl.dtype, stages: int | None) -> int | None:
    """``num_stages`` of a loop that loads and multiplies ``element``: ``stages``, or 1, which takes no cp.async.

    Where Triton shifts the products of tcgen05 as well, no fence of ours stays between a copy and its product.
    """
    return 1 if needs_fence(element, 10, 12) else stages


@triton.jit
def fence_copies(element: tl.constexpr):
    """The fence that Triton forgets, between the loads of a loop and their product by wgmma."""
    if needs_fence(element, 9, 10):
        tl.inline_asm_elementwise(
            "{ fence.proxy.async.shared::cta; mov.b32 $0, 0; }", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """What Triton needs around a launch: the tensor's GPU as the current one. Nothing under the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def asynchronous(config: KernelConfig, element_bytes: int) -> bool:
    """Whether products are asynchronous, that is wgmma (ASYNC)."""
    return config.arch >= 90 and element_bytes == 2


def has_tensor_memory(tensor: Tensor) -> bool:
    """Whether its GPU multiplies with tcgen05: B200, B300, Thor."""
    return tensor.is_cuda and (10, 0) <= torch.cuda.get_device_capability(tensor.device) < (12, 0)


def widened(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a float32 product, as float32 both if a kernel that converts one of them would lose digits.

    With tensor memory Triton takes tf32, whatever precision a kernel asks for, where it converts an operand from fewer
    bits (its issue 10176). That is exact for both operands of 16 bits, and cuts the other operand's digits otherwise.
    """
    if left.dtype == right.dtype or not has_tensor_memory(left):
        return left, right
    return left.float(), right.float()


def config_for(kernel: str, x: Tensor, d_in: int, d_out: int) -> KernelConfig:
    """The config of a kernel for x's GPU. Under the interpreter, where x is on the CPU, the config of sm_80."""
    chip = costs.chip(x.device)
    return tiles.kernel_config(chip.gpu, chip.arch or 80, kernel, x.element_size(), d_in, d_out)


def even_rows(tensor: Tensor, block_k: int) -> Tensor:
    """``tensor`` [T, d] or [B, L, d] as rows that a kernel reads without masks: [T, d] of a width that block_k divides.

    Copied and padded with zeros if the width needs it, copied if rows do not begin at a multiple of 16 bytes.
    """
    tensor = rows(tensor)
    padding = -tensor.shape[1] % block_k
    if padding:
        return torch.nn.functional.pad(tensor, (0, padding))
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


def checked(x: Tensor, dy: Tensor) -> int:
    """The number of tokens. Raises ValueError if it or a width is more than the kernels can count."""
    if max(*x.shape, dy.shape[1]) > _INT32_MAX:
        raise ValueError(
            f"x and dy must have fewer than 2^31 tokens and features for backend='triton', got {x.shape[0]} tokens, "
            f"d_in={x.shape[1]}, d_out={dy.shape[1]}; split the call"
        )
    return x.shape[0]
