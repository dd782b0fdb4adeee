"""The linear layers that are measured, by name: those of three models from 135 million to 8 billion parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A linear layer, d_in -> d_out; ``also`` names layers of the same model and size that it stands for."""

    name: str
    d_in: int
    d_out: int
    also: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return self.name.rsplit(".", 1)[0]


# hidden size, size of k and v, size of the feed-forward layer: from the models' published configurations.
_MODELS = {
    "smollm2-135m": (576, 192, 1536),
    "qwen2.5-3b": (2048, 256, 11008),
    "llama-3.1-8b": (4096, 1024, 14336),
    # Small enough to walk every step on a CPU in seconds; 40 and 72 are multiples of 8 but of no tile.
    "tiny": (40, 16, 72),
}


def _layers(model: str, hidden: int, kv: int, wide: int) -> dict[str, Layer]:
    sizes = {"q": (hidden, hidden), "kv": (hidden, kv), "o": (hidden, hidden)}
    sizes |= {"gate_up": (hidden, wide), "down": (wide, hidden)}
    return {f"{model}.{name}": Layer(f"{model}.{name}", *size) for name, size in sizes.items()}


#: Every layer by its name, as in "llama-3.1-8b.gate_up"; "kv" is one of k and v, "gate_up" one of gate and up.
LAYERS = {name: layer for model, sizes in _MODELS.items() for name, layer in _layers(model, *sizes).items()}
MODELS = tuple(model for model in _MODELS if model != "tiny")


def choose(names: list[str]) -> list[Layer]:
    """Layers by layer name, model name or "all"; within a model those of one size are measured once.

    Raises:
        ValueError: a name that is none of these.
    """
    chosen: dict[tuple[str, int, int], Layer] = {}
    for name in names:
        if name in LAYERS:
            found = [LAYERS[name]]
        else:
            models = MODELS if name == "all" else (name,)
            found = [layer for layer in LAYERS.values() if layer.model in models]
        if not found:
            raise ValueError(f"{name!r} is no layer, no model and not 'all'; layers: {', '.join(LAYERS)}")
        for layer in found:
            key = (layer.model, layer.d_in, layer.d_out)
            first = chosen.get(key)
            if first is None:
                chosen[key] = layer
            elif layer.name != first.name and layer.name not in first.also:
                chosen[key] = Layer(first.name, first.d_in, first.d_out, (*first.also, layer.name))
    return list(chosen.values())
