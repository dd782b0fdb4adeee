"""The default layers: the q, k, v and o projections in the last layer with softmax attention of a model's text decoder.

Found by structure alone, on any ``nn.Module`` and before anything runs:

1. The *stacks* are the outermost lists of layers that hold attention. A vision or audio tower and an encoder have one
   each, the text decoder too. :func:`_decoder_stack` chooses the decoder's.
2. The *layer* is the last one of that stack that holds softmax attention: hybrid models end in layers without it.
3. The *projections* of each attention module in that layer (a decoder layer of a sequence-to-sequence model has two)
   are told by their attribute names and by what the module's code calls.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Literal

from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

#: Names of functions that compute softmax attention, or of the tables from which such a function is taken.
_SOFTMAX = re.compile(
    r"softmax|scaled_dot_product_attention|flex_attention|flash_?attn|flash_?attention|memory_efficient_attention|sdpa"
    r"|all_attention_functions",
    re.I,
)
#: What only recurrent and linear-attention modules have: a class that calls itself so, or a state's decay.
_RECURRENT_CLASS = re.compile(
    r"linear_?att|lightning|delta_?(net|att|rule)|mamba|rwkv|retention|retnet|recurrent|lstm|ssm|s4|hyena", re.I
)
_RECURRENT_PARAMETER = re.compile(r"^(A_log|dt_bias|time_decay|slope_rate|decay)$", re.I)

_QUERY_KEY_VALUE = re.compile(r"^w?(?!vq$)([qkv]{1,3})[zs]?$|^w?(query|queries|key|keys|value|values)$")
_OUTPUT_WORDS = {"o", "out", "output", "wo"}
_OUTPUT_NAMES = {"c_proj", "proj", "projection", "dense", "unifyheads", "unify_heads", "post_proj", "final_linear"}
_FUSED_NAMES = {"c_attn", "att_proj", "attn_proj", "in_proj", "in_projection", "proj_in", "packed_proj"}
_NO_PROJECTION = {"norm", "layernorm", "rmsnorm", "ln", "conv", "sconv", "pos", "position", "rel", "relative"}
_MLP_NAMES = re.compile(r"mlp|ffn?|feed|fc|up|down|gate|expert|intermediate|w[123]", re.I)

_DECODER_WORDS = {"decoder", "dec"}
_SIDE_WORDS = {
    "cross",
    "encoder",
    "enc",
    "vision",
    "visual",
    "vit",
    "clip",
    "siglip",
    "image",
    "images",
    "img",
    "video",
}
_SIDE_WORDS |= {"audio", "speech", "acoustic"}


def linear_kind(module: nn.Module) -> Literal["linear", "conv1d"] | None:
    """ "linear" for an ``nn.Linear`` (subclasses too), "conv1d" for GPT-2's linear with a transposed weight."""
    if isinstance(module, nn.Linear):
        return "linear"
    weight = module._parameters.get("weight")
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2:
        return "conv1d"
    return None


def last_attention(model: nn.Module) -> list[str]:
    """Names of the attention projections of the last decoder layer that has softmax attention.

    These are the linear modules that make queries, keys, values and the attention's output, however they are called:
    separate, fused (``c_attn``, ``qkv``), low-rank (DeepSeek's five) or split over two modules (BERT). Adapters of
    PEFT inside a projection belong to it. Norms, gates, indexers and position terms inside the attention do not.

    Raises:
        ValueError: no softmax attention in the model, or attention whose projections are not linear modules, as
            ``nn.MultiheadAttention``, whose weights are parameters of its own. The message names layers that would do.
    """
    return _Search(model).projections()


@dataclass
class _Stack:
    """One list of layers that holds attention, or a decoder that is one layer without a list."""

    name: str
    module: nn.Module
    one_layer: bool = False


class _Search:
    """One walk over a model: which modules are attention, and which stack of layers is the decoder's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        attention = {id(m): _attention_kind(m) for m in model.modules()}
        self.softmax = {key for key, kind in attention.items() if kind == "softmax"}
        #: modules that make q, k and v; in a stack where some are known to compute softmax, these only
        self.attention = {key for key, kind in attention.items() if kind}
        self.attention_parameters = {
            id(p) for module in model.modules() if id(module) in self.attention for p in module.parameters()
        }
        self._holds: dict[int, bool] = {}

    def projections(self) -> list[str]:
        """See :func:`last_attention`."""
        if not self.attention:
            name = type(self.model).__name__
            lists = any(isinstance(module, CONTAINERS) for module in self.model.modules())
            found = (
                f"found no attention with a softmax in {name}"
                if lists
                else (f"needs a model with a list of decoder layers, and {name} has none")
            )
            raise ValueError(f'layers="last_attention" {found}: {self.suggestion()}')
        block = self.last_layer()
        chosen: list[nn.Module] = []
        for module, parents in _walk(block):
            # An indexer or a compressor inside an attention has projections of its own, which are none of these.
            if id(module) in self.attention and not any(id(parent) in self.attention for parent in parents):
                self.refuse_bare_parameters(module, block)
                chosen += _projections_of(module, parents)
        keep = {
            id(part)
            for projection in chosen
            for part in projection.modules()
            if any(parameter.dim() >= 2 for parameter in part.parameters(recurse=False))
        }
        return [name for name, module in self.model.named_modules() if id(module) in keep]

    def holds_attention(self, module: nn.Module) -> bool:
        """Whether the module is attention or has some inside."""
        if id(module) not in self._holds:
            self._holds[id(module)] = any(id(inner) in self.attention for inner in module.modules())
        return self._holds[id(module)]

    def holders(self, module: nn.Module) -> list[nn.Module]:
        """The children that hold attention, one per place: a layer used three times counts three times."""
        return [child for child in module._modules.values() if child is not None and self.holds_attention(child)]

    def is_stack_of_whole_layers(self, module: nn.Module) -> bool:
        """Children that hold attention are of one class and hold a matrix besides (the MLP's).

        T5's ``block[i].layer`` (self attention, cross attention, MLP) and a list of attention heads are not.
        """
        holders = self.holders(module)
        return (
            bool(holders)
            and len({type(child) for child in holders}) == 1
            and all(
                any(p.dim() >= 2 and id(p) not in self.attention_parameters for p in child.parameters())
                for child in holders
            )
        )

    def stacks(self, root: nn.Module, whole: bool = False) -> list[_Stack]:
        """The outermost containers inside ``root`` with layers that hold attention, in order of registration."""
        found: list[_Stack] = []

        def visit(name: str, module: nn.Module) -> None:
            if not self.holds_attention(module) or id(module) in self.attention:
                return
            if isinstance(module, CONTAINERS) and (not whole or self.is_stack_of_whole_layers(module)):
                found.append(_Stack(name, module))
                return
            for child in self.holders(module):
                visit(self.names[id(child)], child)

        visit(self.names[id(root)], root)
        return found

    def last_layer(self) -> nn.Module:
        """The last layer of the decoder's stack that holds attention."""
        stacks = self.stacks(self.model)
        if not stacks:  # layers that are attributes, without a list
            stacks = [
                _Stack(name, module)
                for name, module in self.model.named_modules()
                if len(self.holders(module)) > 1 and self.is_stack_of_whole_layers(module)
            ]
        if not stacks:
            return self.model
        stack = _decoder_stack(self, stacks)
        if any(id(inner) in self.softmax for inner in stack.module.modules()):
            self.attention = self.softmax
            self._holds.clear()
        if stack.one_layer:
            return stack.module
        block = self.holders(stack.module)[-1]
        while id(block) not in self.attention:
            inner = self.stacks(block, whole=True)
            if not inner:
                break
            block = self.holders(inner[-1].module)[-1]
        return block

    def refuse_bare_parameters(self, module: nn.Module, block: nn.Module) -> None:
        """Raise for attention whose projections are not linear modules."""
        if _projections_of(module, []):
            return
        where = self.names[id(module)]
        others = [
            self.names[id(inner)]
            for inner in block.modules()
            if linear_kind(inner) and id(inner.weight) not in self.attention_parameters
        ]
        example = f"layers={others[:4]!r}" if others else self.suggestion()
        raise ValueError(
            f'layers="last_attention" found the attention {where!r} ({type(module).__name__}), whose projections '
            "are not linear modules (nn.Linear or Conv1D), so that their gradients cannot be measured: choose other "
            f"layers, for example {example}"
        )

    def suggestion(self) -> str:
        """Which ``layers`` would do for a model without attention."""
        best: tuple[int, str] | None = None
        for module in self.model.modules():
            children = [child for child in module._modules.values() if child is not None]
            like = [child for child in children if any(linear_kind(inner) for inner in child.modules())]
            if isinstance(module, CONTAINERS) and like and (best is None or len(like) >= best[0]):
                best = len(like), self.names[id(like[-1])]
        if best is None:
            linears = [name for name, module in self.model.named_modules() if name and linear_kind(module)]
            if not linears:
                return 'layers="all" measures every parameter that can be measured'
            best = 1, linears[-1]
        return (
            f'layers=["{best[1]}"] measures its last layer with linear modules, layers="all" all that can be measured'
        )


def _walk(root: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every module inside ``root`` with its parents, from ``root`` down."""
    seen: set[int] = set()

    def visit(module: nn.Module, parents: list[nn.Module]) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield module, parents
        for child in module.children():
            yield from visit(child, [*parents, module])

    yield from visit(root, [])


def _words(name: str) -> list[str]:
    """'q_a_proj' -> [q, a, proj]; 'SelfAttention' -> [self, attention]; 'Wqkv' -> [wqkv]; 'query2' -> [query]."""
    return re.findall(r"[a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())


def _roles(name: str) -> set[str]:
    """Which of "q", "k", "v" and "o" a child's attribute name says that it makes."""
    words = _words(name)
    if _NO_PROJECTION.intersection(words):
        return set()
    if _OUTPUT_WORDS.intersection(words):
        return set() if "gate" in words else {"o"}
    roles: set[str] = set()
    for word in words:
        match = _QUERY_KEY_VALUE.match(word)
        if match:
            roles |= set(match.group(1) or match.group(2)[0])
    return roles


def _is_mlp(name: str) -> bool:
    return any(_MLP_NAMES.fullmatch(word) for word in re.split(r"[._]", name))


def _linears(module: nn.Module) -> bool:
    return any(linear_kind(inner) for inner in module.modules())


def _projections_of(attention: nn.Module, parents: list[nn.Module]) -> list[nn.Module]:
    """The children of an attention module that make q, k, v and o; BERT's o is a child of its parent."""
    children = {name: child for name, child in attention._modules.items() if child is not None and _linears(child)}
    made = {name: _roles(name) & {"q", "k", "v"} for name in children}
    roles = set().union(*made.values())
    # c_attn makes keys and values where q_attn makes the queries (GPT-2's cross attention).
    fused = set() if {"q", "k"} <= roles else {name for name in children if name.lower() in _FUSED_NAMES}
    inputs = [child for name, child in children.items() if made[name] or name in fused]
    if not inputs:
        return _unnamed_projections(attention)
    if not fused and "q" not in roles:
        # Queries that experts make (JetMoE): their parameters are part of the choice, if only to be listed as skipped.
        return [
            child
            for name, child in attention._modules.items()
            if child is not None and not _NO_PROJECTION.intersection(_words(name))
        ]
    rest = {name: c for name, c in children.items() if all(c is not other for other in inputs)}
    outputs = [child for name, child in rest.items() if "o" in _roles(name) and not _is_mlp(name)]
    outputs = outputs or [child for name, child in rest.items() if "o" in _roles(name)]
    outputs = outputs or [child for name, child in rest.items() if name.lower() in _OUTPUT_NAMES]
    direct = [child for child in rest.values() if linear_kind(child)]
    if not outputs and len(direct) == 1 and len(rest) == 1:
        outputs = direct
    for depth in range(len(parents) - 1, -1, -1):
        if outputs:
            break
        parent = parents[depth]
        named = {n: c for n, c in parent._modules.items() if c is not None and c is not attention and _linears(c)}
        if depth > 0:
            outputs = [c for n, c in named.items() if "o" in _roles(n) or n.lower() in _OUTPUT_NAMES]
        else:  # the whole layer: its "output" and its "dense" are the MLP's
            outputs = [
                c
                for n, c in named.items()
                if linear_kind(c) and ("o" in _roles(n) or n.lower() in _OUTPUT_NAMES) and n not in ("output", "dense")
            ]
        attention = parent
    return inputs + outputs


def _unnamed_projections(module: nn.Module) -> list[nn.Module]:
    """All linear modules inside, where none of them has the name of an MLP's: at least q, k, v fused and o."""
    linears = {name: inner for name, inner in module.named_modules() if name and linear_kind(inner)}
    mlp = any(map(_is_mlp, linears))
    return [] if mlp or len(linears) < 2 or isinstance(module, nn.MultiheadAttention) else list(linears.values())


def _attention_kind(module: nn.Module) -> Literal["softmax", "unknown"] | None:
    """ "softmax" for a module that makes q, k and v and computes softmax attention, "unknown" if its code hides that.

    None for everything else: linear attention and state-space mixers, which have such projections too, and MLPs.
    """
    if isinstance(module, nn.MultiheadAttention):
        return "softmax"
    if linear_kind(module) or isinstance(module, CONTAINERS):
        return None
    roles: set[str] = set()
    names: list[str] = []
    for name, child in module._modules.items():
        # Projections that are convolutions (SqueezeBERT) or quantized are attention's all the same: refused by name.
        if child is not None and any(parameter.dim() >= 2 for parameter in child.parameters()):
            roles |= _roles(name)
            names.append(name.lower())
    bare: set[str] = set()
    for name, parameter in module._parameters.items():  # XLNet's q, k, v and o
        if parameter is not None and parameter.dim() >= 2:
            bare |= _roles(name)
    roles |= bare if {"q", "k"} <= bare else set()
    says_so = any("attn" in word or "attention" in word for word in _words(type(module).__name__))
    inputs = roles & {"q", "k", "v"}
    fused = any(name in _FUSED_NAMES for name in names)
    recurrent = any(_RECURRENT_PARAMETER.match(name) for name in [*module._parameters, *module._buffers]) or any(
        isinstance(child, nn.Conv1d) for name, child in module._modules.items() if not _roles(name)
    )
    if recurrent:
        return None
    if not (inputs or fused):  # attention by its class name, with projections called otherwise
        return "softmax" if says_so and _unnamed_projections(module) and _computes_softmax(module) else None
    if _computes_softmax(module):
        return "softmax" if len(roles) > 1 or fused or says_so else None
    complete = {"q", "k", "v"} <= inputs or ("q" in inputs and "o" in roles)
    return "unknown" if complete and not _RECURRENT_CLASS.search(type(module).__name__) else None


def _computes_softmax(module: nn.Module) -> bool:
    """Whether the code of the module's class, or of a part of it that is not a projection, names softmax attention."""
    parts = [module, *(child for child in module.children() if not _linears(child))]
    return any(isinstance(part, nn.Softmax) or _class_computes_softmax(type(part)) for part in parts)


_KNOWN: dict[type, bool] = {}


def _class_computes_softmax(cls: type) -> bool:
    if cls not in _KNOWN:
        functions = [
            inspect.unwrap(member)
            for base in cls.__mro__
            if base is not nn.Module and base is not object and not base.__module__.startswith("torch.nn.")
            for member in vars(base).values()
            if callable(member) and isinstance(inspect.unwrap(member), FunctionType)
        ]
        _KNOWN[cls] = any(_calls_softmax(function, 3) for function in functions)
    return _KNOWN[cls]


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_names(constant)


def _calls_softmax(function: Any, depth: int) -> bool:
    """Whether a Python function names softmax attention, or a function that it calls does, ``depth`` calls deep."""
    names = set(_code_names(function.__code__))
    if any(_SOFTMAX.search(name) for name in names):
        return True
    if depth == 0:
        return False
    for name in names:
        called = function.__globals__.get(name)
        called = inspect.unwrap(called) if callable(called) else None
        if isinstance(called, FunctionType) and _calls_softmax(called, depth - 1):
            return True
    return False


def _decoder_stack(search: _Search, stacks: list[_Stack]) -> _Stack:
    """The stack of the text decoder, by the model's own methods, then by names, width and place.

    A later criterion decides only between stacks that the earlier ones leave.
    """
    model = search.model
    outer: list[nn.Module] = []  # the outermost modules with transformers' methods
    inside: set[int] = set()
    for module in model.modules():
        if id(module) not in inside and (_has(module, "get_decoder") or _has(module, "get_output_embeddings")):
            outer.append(module)
            inside |= {id(inner) for inner in module.modules()}
    heads: list[tuple[nn.Module, nn.Module]] = []  # a module and its output embedding
    for module in outer:
        within = {id(inner) for inner in module.modules()}
        decoder = _ask(module, "get_decoder", within)
        if decoder is not None and search.holds_attention(decoder):
            kept = {id(inner) for inner in decoder.modules()}
            own = [s for s in stacks if id(s.module) in kept] or [_Stack(search.names[id(decoder)], decoder, True)]
            stacks = [s for s in stacks if id(s.module) not in within] + own
        head = _ask(module, "get_output_embeddings", within)
        if head is not None:
            heads.append((module, head))
    if len(stacks) > 1 and heads:
        within = {id(inner) for module, _ in heads for inner in module.modules()}
        stacks = [s for s in stacks if id(s.module) in within] or stacks
    if len(stacks) > 1:
        ranks = [_rank(search, stack) for stack in stacks]
        stacks = [stack for stack, rank in zip(stacks, ranks, strict=True) if rank == min(ranks)]
    if len(stacks) > 1:
        head = heads[-1][1] if heads else _output_head(search, stacks)
        if head is not None:
            name = search.names[id(head)]
            near = [_common(stack.name, name) for stack in stacks]
            stacks = [stack for stack, common in zip(stacks, near, strict=True) if common == max(near)]
    return stacks[-1]


def _has(module: nn.Module, method: str) -> bool:
    return callable(getattr(module, method, None))


def _ask(module: nn.Module, method: str, within: set[int]) -> nn.Module | None:
    """What the module's method returns, if that is another module inside it."""
    try:
        answer = getattr(module, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return answer if isinstance(answer, nn.Module) and id(answer) in within else None


def _rank(search: _Search, stack: _Stack) -> int:
    """0 for a stack that a name on its path calls a decoder, 2 for an encoder, a tower of another modality or cross
    attention beside the layers, else 1."""
    path = stack.name.split(".")
    words = set(_words("_".join(path)))
    for depth in range(1, len(path)):
        words |= set(_words(type(search.model.get_submodule(".".join(path[:depth]))).__name__))
    if words & _SIDE_WORDS:
        return 2
    return 0 if words & _DECODER_WORDS else 1


def _output_head(search: _Search, stacks: list[_Stack]) -> nn.Module | None:
    """The linear module outside the stacks that returns to the vocabulary, or the last linear there is."""
    inside = {id(inner) for stack in stacks for inner in stack.module.modules()}
    vocabularies = {m.num_embeddings for m in search.model.modules() if isinstance(m, nn.Embedding)}
    linears = [m for m in search.model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    heads = [m for m in linears if m.out_features in vocabularies]
    return heads[-1] if heads else (linears[-1] if linears else None)


def _common(one: str, other: str) -> int:
    """How many leading parts two module names share."""
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count
