"""The trainable parameters of the choice that are not measured: which, what share of the model, and why."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Skipped:
    """``shares`` {parameter name: share of all trainable parameters} and ``reasons`` {parameter name: why}."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._read_sizes()
        self.shares: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self._unsaid: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.reasons

    def add(self, names: Iterable[str], reason: str) -> None:
        """Leave parameters out, each with the first reason given for it."""
        for name in names:
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            if name not in self._sizes:  # it may not have trained then
                self._read_sizes()
            if name in self._sizes:  # frozen ones have no share
                self.shares[name] = self._sizes[name] / self._trainable
            self._unsaid.append(name)

    def _read_sizes(self) -> None:
        self._sizes = {
            name: parameter.numel()
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        self._trainable = sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    def news(self, most: int = 5) -> str | None:
        """A warning about what was added since the last call; None where nothing was."""
        names, self._unsaid = self._unsaid, []
        if not names:
            return None
        share = sum(self.shares.get(name, 0.0) for name in names)
        first: dict[str, list[str]] = {}
        for name in names:
            first.setdefault(self.reasons[name], []).append(name)
        listed = "; ".join(f"{some(group, most)} ({reason})" for reason, group in list(first.items())[:most])
        more = f"; ... {len(first)} reasons in all" if len(first) > most else ""
        return (
            f"not measured, {share:.2%} of the trainable parameters: {listed}{more}. tracker.skipped lists them, "
            "tracker.skipped_reasons says why"
        )


def some(names: Iterable[str], most: int = 5) -> str:
    """A list of names as a message shows it."""
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
