"""Experts of a mixture: one parameter [E, ...] holds a matrix per expert, and a token meets those it is routed to.

A sample's gradient of expert e's matrix is ``G_p = sum over the tokens t of p that are routed to e of dy_t x_t^T``,
where dy contains the routing weight, because it is taken behind the product.

transformers has several implementations (``config._experts_implementation``): a loop over experts, batched and grouped
products. :class:`ExpertsTrace` therefore follows the module's own forward while it runs and changes nothing in it. It
knows which token each row of a tensor belongs to, as long as operations keep rows apart, and notes every product with
an expert's matrix. An operation that it does not know on this way makes the module unreadable, by name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..segments import to_device
from ..tolerances import relative
from . import distributed
from .calls import Call
from .formula import Mismatch, first_tensor
from .layers import Layer
from .parameter_gram import Tokens
from .quiet import quiet, uncounted
from .rows import on_gpu

#: Operations whose output's row r depends on row r of their tagged operands alone.
# fmt: off
_ELEMENTWISE = frozenset((
    "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "true_divide", "neg", "pow", "square",
    "sqrt", "rsqrt", "exp", "abs", "clamp", "clamp_", "clip", "minimum", "maximum", "sigmoid", "tanh", "silu",
    "gelu", "relu", "relu_", "relu6", "selu", "elu", "celu", "mish", "softplus", "leaky_relu", "hardtanh",
    "hardswish", "hardsigmoid", "logsigmoid", "erf", "masked_fill", "masked_fill_", "dropout", "clone", "__add__",
    "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__",
    "__pow__", "__neg__",
))
# fmt: on
_ADDITIONS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
_CASTS = frozenset(("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"))
_PRODUCTS = frozenset(("linear", "matmul", "__matmul__", "mm", "bmm"))
_GROUPED = frozenset(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"))
_RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten"))


@dataclass(frozen=True)
class _Matrices:
    """A tensor made from a parameter of the experts.

    ``experts``: None for all of them, [E, ...]; a number for one's matrix (or bias); [S] for one per row of a tensor.
    ``flipped``: the last two dimensions changed places.
    """

    leaf: str
    experts: int | Tensor | None = None
    flipped: bool = False


@dataclass(frozen=True)
class _Rows:
    """The first dimensions of a tensor run over these tokens, whose ids are ``tokens``.

    ``product``: the tensor is the output of this product and nothing else.
    """

    tokens: Tensor
    product: Product | None = None


@dataclass
class Product:
    """One product of S routed tokens with matrices of experts: ``y_s = W[experts_s] x_s``.

    ``x`` [S, d_in]; ``tokens`` [S] int64, their places in the module's input; ``experts``: one expert, or [S] int64.
    ``transposed``: the parameter is [E, d_in, d_out]. ``bias``: the parameter that is added to it, if any.
    """

    leaf: str
    x: Tensor
    tokens: Tensor
    experts: int | Tensor
    transposed: bool
    bias: str | None = None
    version: int = 0

    def to_host(self) -> None:
        """Bring ``tokens`` and ``experts`` to the host, without waiting for a GPU: they are read in backward."""
        if on_gpu(self.tokens):
            # Copies go to the stream of their device, which need not be the current one.
            stream = torch.cuda.current_stream(self.tokens.device)
            self.tokens = self._pinned(self.tokens)
            self.experts = self._pinned(self.experts) if isinstance(self.experts, Tensor) else self.experts
            self._copied = stream.record_event()

    def wait(self) -> None:
        """Until what :meth:`to_host` copies is there."""
        copied = getattr(self, "_copied", None)
        if copied is not None:
            copied.synchronize()

    @staticmethod
    def _pinned(values: Tensor) -> Tensor:
        held = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        return held.copy_(values, non_blocking=True)


def experts_input(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tokens that a call of the experts gets: its first tensor, [..., d].

    Experts that get no routing (Llama 4's) take the tokens once per expert, expert after expert: [E, T, d].
    """
    x = first_tensor(args, kwargs)
    if x is None or layer.kind != "experts":
        return x
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    count = next(layer.module.parameters(recurse=False)).shape[0]
    if len(tensors) == 1 and x.dim() == 2 and x.shape[0] % count == 0:
        return x.unflatten(0, (count, -1))
    return x


class ExpertsTrace(TorchFunctionMode):
    """Follows one call of a module of experts. ``with`` it, run the module's forward; then read ``products``.

    ``unreadable``: why the products cannot be known, or None. ``take(product, dy)`` is called in backward for every
    product once it is set.
    """

    def __init__(self, layer: Layer, x: Tensor, *, verify: bool) -> None:
        """``x``: the module's input. ``verify``: recompute every product by its formula and compare."""
        super().__init__()
        self.products: list[Product] = []
        self.unreadable: str | None = None
        self._thread: int | None = None  # the one that is inside
        self.take: Callable[[Product, Tensor], None] | None = None
        self._layer, self._verify = layer, verify
        self._marks: Any = WeakIdKeyDictionary()
        self._empty = x.numel() == 0
        tokens = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
        self._marks[x] = _Rows(tokens)
        for leaf, parameter in layer.module._parameters.items():
            if parameter is not None:
                self._marks[parameter] = _Matrices(leaf)
                if distributed.is_dtensor(parameter):
                    self.unreadable = f"{leaf} is spread over ranks while it computes"
        if getattr(layer.module, "_is_expert_parallel", False):
            self.unreadable = "its experts are spread over ranks"

    def __enter__(self) -> ExpertsTrace:
        super().__enter__()
        self._thread = threading.get_ident()
        return self

    def leave(self) -> None:
        """Take the mode off the stack of modes of this thread, if this thread put it there."""
        if self._thread == threading.get_ident():
            self._thread = None
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # a part that is compiled cannot be followed
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if self.unreadable is None:
            with uncounted():
                self._follow(name, args, kwargs or {}, out)
        return out

    def finish(self) -> None:
        """The forward is over.

        Raises:
            Mismatch: its products are not known.
        """
        self._marks = WeakIdKeyDictionary()
        if self.unreadable is None:
            used = {product.leaf for product in self.products} | {product.bias for product in self.products}
            own = self._layer.module._parameters
            missing = [leaf for leaf, p in own.items() if p is not None and p.requires_grad and leaf not in used]
            if missing and not self._empty:
                self.unreadable = f"no product with {missing[0]} was seen in its forward{self._implementation()}"
        if self.unreadable is not None:
            self.products = []
            raise Mismatch(self.unreadable)
        for product in self.products:
            product.to_host()

    def overlapping(self) -> set[str]:
        """Parameters of which one expert's matrix may be in several products."""
        found: set[str] = set()
        by_leaf: dict[str, list[int | Tensor]] = {}
        for product in self.products:
            by_leaf.setdefault(product.leaf, []).append(product.experts)
        for leaf, experts in by_leaf.items():
            if len(experts) > 1 and (any(isinstance(e, Tensor) for e in experts) or len(set(experts)) < len(experts)):
                found |= {leaf, *(p.bias for p in self.products if p.leaf == leaf and p.bias is not None)}
        return found

    def _implementation(self) -> str:
        name = getattr(getattr(self._layer.module, "config", None), "_experts_implementation", None)
        return "" if name is None else f" (config._experts_implementation is {name!r})"

    def _mark(self, tensor: Any) -> Any:
        return self._marks.get(tensor) if isinstance(tensor, Tensor) else None

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Mark the output of one operation, and note a product."""
        if not args:
            return
        operands = [(value, self._mark(value)) for value in (*args, *kwargs.values())]
        matrices = [mark for _, mark in operands if isinstance(mark, _Matrices)]
        if matrices:
            self._with_matrices(name, args, kwargs, out, matrices)
            return
        rows = [(value, mark) for value, mark in operands if isinstance(mark, _Rows)]
        if rows and name == "__getitem__" and not isinstance(self._mark(args[0]), _Rows):
            return  # a table looked up at rows of something else
        if rows:
            self._with_rows(name, args, kwargs, out, rows)

    # What happens to the parameters

    def _with_matrices(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, matrices: list[_Matrices]
    ) -> None:
        mark = self._mark(args[0])
        if isinstance(mark, _Matrices):
            selected = self._selected(name, args, kwargs, mark)
            if selected is not None:
                self._marks[out] = selected
                return
            if name == "unbind" and mark.experts is None and not args[1:] and not kwargs.get("dim"):
                for expert, part in enumerate(out):
                    self._marks[part] = _Matrices(mark.leaf, expert)
                return
        if name in _PRODUCTS or name in _GROUPED:
            self._product(name, args, kwargs, out)
        elif name in _ADDITIONS and len(args) == 2 and not kwargs:
            self._add_bias(args, out)
        elif isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad:
            self.unreadable = f"{matrices[0].leaf} is used by {name}, which is not followed{self._implementation()}"

    def _selected(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], mark: _Matrices) -> _Matrices | None:
        """What a selection, a transposition or a cast makes of matrices; None: it is none of these."""
        if name in _CASTS:
            return mark
        if name in ("T", "mT", "t") or name == "transpose":
            ndim, dims = args[0].dim(), (*args[1:], *kwargs.values())
            last = {ndim - 2, ndim - 1}
            if (name == "transpose" and {dim % ndim for dim in dims} == last) or (
                name != "transpose" and (ndim == 2 or name == "mT")
            ):
                return _Matrices(mark.leaf, mark.experts, not mark.flipped)
            return None
        index = args[1] if name == "__getitem__" else args[2] if name == "index_select" and args[1] == 0 else None
        if mark.experts is not None or mark.flipped or index is None:
            return None
        if isinstance(index, int):
            return _Matrices(mark.leaf, index % args[0].shape[0])
        if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) and index.dim() <= 1:
            # A scalar was read by the model already; rows stay where they are.
            return _Matrices(mark.leaf, int(index) % args[0].shape[0] if index.dim() == 0 else index)
        return None

    def _product(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Note ``x W^T`` (linear), ``x W`` or ``W x``."""
        first: Any = args[0]
        second: Any = args[1] if len(args) > 1 else next(iter(kwargs.values()))
        left, right = self._mark(first), self._mark(second)
        turned = isinstance(left, _Matrices)  # W x, a column per token
        mark, rows, x = (left, right, second) if turned else (right, left, first)
        if not isinstance(mark, _Matrices) or isinstance(rows, _Matrices):
            self.unreadable = f"{name} multiplies parameters with each other"
            return
        if not isinstance(rows, _Rows):
            self.unreadable = f"which tokens {mark.leaf} is multiplied with cannot be followed{self._implementation()}"
            return
        transposed = mark.flipped if name == "linear" or turned else not mark.flipped
        experts = self._experts_of(name, args, kwargs, mark, rows.tokens)
        features = x.shape[rows.tokens.dim() :].numel()
        columns = turned and (x.dim() < 2 or x.shape[-1] != 1)
        if experts is None or columns or features != x.shape[-2 if turned else -1]:
            self.unreadable = f"{name} multiplies {mark.leaf} with tensors of unknown layout{self._implementation()}"
            return
        product = Product(mark.leaf, x.detach().reshape(-1, features), rows.tokens.reshape(-1), experts, transposed)
        product.version = product.x._version
        bias = (args[2] if len(args) > 2 else kwargs.get("bias")) if name == "linear" else None
        if bias is not None and not self._owns(product, self._mark(bias)):
            return
        if self._verify:
            self._check(product, out, bias)
        self._marks[out] = _Rows(rows.tokens, product)
        self.products.append(product)
        if out.requires_grad:
            self._watch(product, out)

    def _experts_of(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], mark: _Matrices, tokens: Tensor
    ) -> int | Tensor | None:
        """The expert of each row of a product, or the one of all rows; None where that is not known."""
        if name in _GROUPED:
            ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
            if mark.experts is not None or not isinstance(ends, Tensor) or tokens.dim() != 1:
                return None
            at = torch.arange(len(tokens), device=ends.device, dtype=ends.dtype)
            return torch.searchsorted(ends, at, right=True)
        if isinstance(mark.experts, Tensor):
            return mark.experts if mark.experts.shape == tokens.shape else None
        if mark.experts is None:
            count = self._layer.module.get_parameter(mark.leaf).shape[0]
            if tokens.dim() < 2 or tokens.shape[0] != count:
                return None
            each = torch.arange(count, device=tokens.device)
            return each.view(-1, *[1] * (tokens.dim() - 1)).expand(tokens.shape).reshape(-1)
        return mark.experts

    def _add_bias(self, args: tuple[Any, ...], out: Tensor) -> None:
        y, bias = args if isinstance(self._mark(args[1]), _Matrices) else args[::-1]
        rows = self._mark(y)
        product = rows.product if isinstance(rows, _Rows) else None
        if product is None:
            self.unreadable = f"{self._mark(bias).leaf} is added to something else than a product of its matrices"
        elif self._owns(product, self._mark(bias)):
            self._marks[out] = _Rows(rows.tokens)

    def _owns(self, product: Product, bias: Any) -> bool:
        """Note the bias of a product. What it is added to has the gradient of the product."""
        if not isinstance(bias, _Matrices) or bias.leaf != f"{product.leaf}_bias" or product.bias is not None:
            self.unreadable = f"something else than {product.leaf}_bias is added to a product with {product.leaf}"
            return False
        product.bias = bias.leaf
        return True

    def _watch(self, product: Product, y: Tensor) -> None:
        name = f"layer {self._layer.name!r}"

        def output_hook(dy: Tensor) -> None:
            if self.take is None:
                return
            if product.x._version != product.version:
                raise RuntimeError(
                    f"the input of {product.leaf} of {name} was modified in place after the product, so its gradient "
                    "can no longer be measured: make that operation out of place, or leave the layer out of layers="
                )
            with torch.no_grad():
                self.take(product, dy)

        y.register_hook(output_hook)

    def _check(self, product: Product, out: Tensor, bias: Tensor | None) -> None:
        """Hold a product against its formula."""
        parameter = self._layer.module.get_parameter(product.leaf).detach()
        with torch.no_grad(), quiet(), torch.autocast(out.device.type, enabled=False):
            y = out.detach().reshape(len(product.x), -1)
            wide = torch.promote_types(y.dtype, torch.float32)
            wanted = torch.zeros_like(y, dtype=wide)
            experts = product.experts
            for expert in [experts] if isinstance(experts, int) else experts.unique().tolist():
                at = slice(None) if isinstance(experts, int) else experts == expert
                matrix = parameter[expert].to(wide)
                wanted[at] = product.x[at].to(wide) @ (matrix if product.transposed else matrix.T)
            wanted = wanted if bias is None else wanted + bias
            finite = torch.isfinite(wanted) & torch.isfinite(y)
            wanted, y = torch.where(finite, wanted, 0.0), torch.where(finite, y.to(wide), 0.0)
            if not float((y - wanted).norm()) <= relative(out.dtype, product.x.dtype) * float(wanted.norm()):
                self.unreadable = f"its product with {product.leaf} is not {product.leaf}[expert] times its tokens"

    # What happens to the tokens

    def _with_rows(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        rows: list[tuple[Tensor, _Rows]],
    ) -> None:
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor) and part.is_floating_point():
                found = self._rows_of(name, args, kwargs, part, rows)
                if found is not None:
                    self._marks[part] = found
                elif self._mark(part) is not None:
                    del self._marks[part]  # changed in place

    def _rows_of(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
        rows: list[tuple[Tensor, _Rows]],
    ) -> _Rows | None:
        """The tokens of an operation's output, where each of its rows follows from that row of the operands."""
        x, mark = rows[0]
        tokens, lead = mark.tokens, mark.tokens.dim()
        if name in _ELEMENTWISE or name in _CASTS:
            fits = [
                (y, other)
                for y, other in rows
                if y.dim() == out.dim() and out.shape[: other.tokens.dim()] == other.tokens.shape
            ]
            same = len(fits) == len(rows) and all(other.tokens is tokens for _, other in fits)
            return _Rows(tokens) if same else None
        if len(rows) > 1 or x is not args[0]:
            return None
        rest = (*args[1:], *kwargs.values())
        if name in _RESHAPES:
            if lead == x.dim() - 1 and out.shape[-1] == x.shape[-1]:
                return _Rows(tokens.reshape(out.shape[:-1]), mark.product)
            return mark if out.shape[:lead] == tokens.shape else None
        if name in ("squeeze", "unsqueeze") and len(rest) == 1:
            return mark if rest[0] % max(x.dim(), out.dim()) >= lead else None
        if name in ("chunk", "split", "tensor_split"):
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            return _Rows(tokens) if dim % x.dim() >= lead else None
        if name == "repeat_interleave" and lead == 1 and isinstance(rest[0], int) and kwargs.get("dim") == 0:
            return _Rows(tokens.repeat_interleave(rest[0]))
        index = args[1] if name == "__getitem__" else args[2] if name == "index_select" and args[1] == 0 else None
        if isinstance(index, tuple) and index and index[0] is Ellipsis:
            inner = all(isinstance(part, slice) for part in index[1:]) and len(index) - 1 <= x.dim() - lead
            return _Rows(tokens) if inner else None
        if isinstance(index, Tensor) and lead == 1 and index.dim() == 1 and not index.is_floating_point():
            return _Rows(tokens[index])
        return None


def expert_tokens(call: Call, product: Product, dy: Tensor, leaf: str) -> Tokens:
    """The tokens of one product, expert after expert and row after row inside; x is 1 where ``leaf`` is a bias.

    On a CPU tokens with a zero dy are left out.
    """
    product.wait()
    dy = dy.reshape(len(product.tokens), -1)
    rows = call.row_of_tokens()[product.tokens]
    experts = product.experts if isinstance(product.experts, Tensor) else torch.full_like(rows, product.experts)
    count = len(call.row_sample)
    key = experts * count + rows
    order = torch.argsort(key, stable=True)
    order = order[rows[order] >= 0]  # the padding of packed rows belongs to no sequence
    if not on_gpu(dy):
        order = order[(dy[order] != 0).any(-1)]
    found, lengths = torch.unique_consecutive(key[order], return_counts=True)
    at, row = to_device(order, dy.device), found % count
    x = product.x[at] if leaf == product.leaf else dy.new_ones(len(order), 1)
    scale = call.scale[row] * call.factor
    return Tokens(x, dy[at], lengths, call.row_sample[row], scale, False, found // count)
