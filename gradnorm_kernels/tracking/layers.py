"""Which modules are measured: the meaning of ``layers=`` and what kind of parameter each chosen module holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attention import last_attention, linear_kind

Kind = Literal["linear", "conv1d", "embedding", "vector", "router", "experts"]
LayerChoice = str | Sequence[str]


#: Why a parameter of the choice has no formula.
KINDS = (
    "linears, embeddings, routers, experts that get their tokens' routing, and norms and other leaf modules with "
    "parameters of one dimension are"
)


@dataclass(frozen=True)
class Layer:
    """One measured module; which of its own parameters train is read at every micro-batch."""

    name: str
    module: nn.Module
    kind: Kind
    frozen: bool = False  # measured although its weight does not train, as the matrix under an adapter


@dataclass
class Selection:
    """The chosen layers, and the trainable parameters of the choice that cannot be measured."""

    layers: list[Layer]
    skipped: dict[str, int] = field(default_factory=dict)  # parameter name -> number of elements
    frozen: list[tuple[str, nn.Module]] = field(default_factory=list)  # modules of the choice of which nothing trains


def kind_of(module: nn.Module) -> Kind | None:
    """What the module's own parameters are to the tracker; None for a module that it cannot measure.

    A subclass of ``nn.Linear`` counts as a linear: its output is taken to be ``x W^T + b``. ``Conv1D`` is GPT-2's
    linear with a transposed weight. "vector" is any module without submodules whose own parameters have at most one
    dimension (norms, gains, scales), other than a batch norm, which makes every row depend on all others. "experts"
    holds a matrix per expert in one parameter, "router" is a linear whose forward also chooses experts.
    """
    own = list(module.parameters(recurse=False))
    if not own:
        return None
    if _is_experts(module):
        return "experts"
    if _is_router(module):
        return "router"
    linear = linear_kind(module)
    if linear:
        return linear
    if isinstance(module, nn.Embedding):
        return None if module.sparse or module.max_norm is not None or module.scale_grad_by_freq else "embedding"
    leaf = next(module.children(), None) is None
    if leaf and all(parameter.dim() <= 1 for parameter in own) and not isinstance(module, _BatchNorm):
        return "vector"
    return None


def _is_experts(module: nn.Module) -> bool:
    """Whether the module's own parameters are [E, a, b], with biases [E, b] that are called like them and "_bias".

    A lone ``weight`` [E, a, b] gets tokens that were routed elsewhere (JetMoE's): nothing tells whose they are.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None}
    matrices = {name for name, p in own.items() if p.dim() == 3}
    biases = {name for name, p in own.items() if p.dim() == 2 and name.removesuffix("_bias") in matrices - {name}}
    named = re.search("expert|moe", type(module).__name__, re.I) is not None and "weight" not in own
    return named and bool(matrices) and matrices | biases == set(own) and len({p.shape[0] for p in own.values()}) == 1


def _is_router(module: nn.Module) -> bool:
    """Whether the module has a linear's parameters, the name of a router and a forward of its own."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.dim() != 2 or not own.keys() <= {"weight", "bias"}:
        return False
    if (bias is not None and bias.shape != weight.shape[:1]) or type(module).forward is nn.Linear.forward:
        return False
    names = "router" if linear_kind(module) else "router|gate|top_?k"
    return not isinstance(module, nn.Embedding) and re.search(names, type(module).__name__, re.I) is not None


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _matching(model: nn.Module, layers: LayerChoice) -> list[str]:
    """The module names that ``layers`` picks, before kinds and trainability are looked at."""
    modules = dict(model.named_modules())
    if layers == "all":
        return list(modules)
    if layers == "last_attention":
        return last_attention(model)
    if isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(
                f'layers={layers!r} is neither "last_attention", "all" nor a regular expression: {error}'
            ) from None
        names = [name for name in modules if name and pattern.search(name)]
        if not names:
            raise ValueError(
                f"layers={layers!r} matches no module name; the model has for example {_examples(modules)}"
            )
        return names
    unknown = [name for name in layers if name not in modules]
    if unknown:
        raise ValueError(
            f"layers names modules that the model does not have: {unknown}; it has for example {_examples(modules)}"
        )
    # A name stands for the module and everything inside it, so that "model.layers.3" means the whole layer.
    return [name for name in modules if any(name == top or name.startswith(f"{top}.") for top in layers)]


def _examples(names: Iterable[str]) -> list[str]:
    return [name for name in names if name][:5]


def select_layers(model: nn.Module, layers: LayerChoice, frozen: bool = False) -> Selection:
    """Resolve ``layers`` to modules with trainable parameters, and with ``frozen`` to linears that do not train too.

    A parameter that a chosen module shares with another module (tied embeddings) brings that module in too: the
    gradient of a parameter is the sum over all its uses.

    Raises:
        ValueError: nothing matches, or nothing that matches has a parameter that trains and can be measured.
        TypeError: ``layers`` is neither a string nor a sequence of strings.
    """
    if not isinstance(layers, str) and not (
        isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers)
    ):
        raise TypeError(
            f'layers must be "last_attention", "all", a regular expression or a list of module names, got {layers!r}'
        )
    matching = _matching(model, layers)
    modules = dict(model.named_modules())
    still = {
        name
        for name in matching
        if frozen and kind_of(modules[name]) in ("linear", "conv1d") and not _trains(modules[name])
    }
    chosen = {name for name in matching if _trains(modules[name])} | still
    shared = {id(p) for name in chosen for p in modules[name].parameters(recurse=False)}
    chosen |= {
        name for name, module in modules.items() if any(id(p) in shared for p in module.parameters(recurse=False))
    }
    asleep = [(name, modules[name]) for name in matching if name not in chosen]
    selection = Selection([], frozen=[(name, module) for name, module in asleep if module._parameters])
    for name, module in modules.items():
        if name not in chosen:
            continue
        kind = kind_of(module)
        if kind is None:
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    selection.skipped[f"{name}.{leaf}" if name else leaf] = parameter.numel()
        else:
            selection.layers.append(Layer(name, module, kind, frozen=name in still))
    if not selection.layers:
        reason = (
            f"its trainable parameters cannot be measured: {list(selection.skipped)[:5]}"
            if selection.skipped
            else "every parameter of it is frozen (requires_grad is False; frozen=True measures linears all the same) "
            "or it has none"
        )
        raise ValueError(f"layers={layers!r} picks nothing that can be measured: {reason}; choose layers that train")
    return selection


class Parameters:
    """Names of the measured layers' parameters: one a parameter, however many modules own it.

    Names, not identities: FSDP2 gives a module another tensor for the time in which it computes.
    """

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        self._layers, self._frozen = selection.layers, selection.frozen
        self._seen: dict[str, tuple[int, bool]] = {}
        wanted = {id(p) for layer in selection.layers for p in layer.module.parameters(recurse=False)}
        first: dict[int, str] = {}
        self._name: dict[tuple[str, str], str] = {}
        self._owners: dict[str, int] = {}
        self._not_embeddings: dict[str, int] = {}  # how many of them are none
        for name, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) in wanted:
                    known = first.setdefault(id(parameter), f"{name}.{leaf}" if name else leaf)
                    self._name[name, leaf] = known
                    self._owners[known] = self._owners.get(known, 0) + 1
                    other = kind_of(module) != "embedding"
                    self._not_embeddings[known] = self._not_embeddings.get(known, 0) + other

    def name(self, layer: Layer, leaf: str) -> str:
        """The parameter's name, the same for all modules that share it."""
        return self._name.get((layer.name, leaf), f"{layer.name}.{leaf}" if layer.name else leaf)

    def tied(self, name: str) -> bool:
        """Whether several modules own the parameter."""
        return self._owners.get(name, 1) > 1

    def tied_to_embeddings(self, name: str) -> bool:
        """Whether several modules own the parameter, all but one of them embeddings."""
        return self.tied(name) and self._not_embeddings[name] == 1

    def news(self) -> tuple[set[str], dict[str, str]]:
        """What changed since the last call.

        Returns:
            The parameters that are other tensors than before, or train and did not; and ``{parameter: why}`` of those
            that can no longer be measured.
        """
        seen: dict[str, tuple[int, bool]] = {}
        owner: dict[int, str] = {}
        wrong: dict[str, str] = {}
        for layer in self._layers:
            for leaf, parameter in layer.module._parameters.items():
                if parameter is None:
                    continue
                name = self.name(layer, leaf)
                if name not in self._owners and parameter.requires_grad:
                    wrong[name] = f"it is new since the tracker was made{_NEW}"
                own = (id(parameter), parameter.requires_grad)
                if seen.setdefault(name, own) != own:
                    why = f"{name!r} was one parameter of several modules, and {layer.name!r} now has another{_NEW}"
                    wrong[name] = wrong[f"{layer.name}.{leaf}"] = why
                elif (other := owner.setdefault(id(parameter), name)) != name:
                    wrong[name] = wrong[other] = f"{other!r} and {name!r} were two parameters and are now one{_NEW}"
        for module_name, module in self._frozen:
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad and id(parameter) not in owner:
                    name = f"{module_name}.{leaf}" if module_name else leaf
                    wrong[name] = f"it did not train when the tracker was made, and does now{_NEW}"
        new = {name for name, own in seen.items() if self._seen and self._seen.get(name) != own and own[1]}
        self._seen = seen
        return new, wrong


_NEW = ": make a new tracker"
