"""One measurement of a training step: a variant, checked against the ways without the tracker, timed in pairs.

Runs in a child process (see ``isolate``), which keeps the model. The optimizer's learning rate is 0: it does all its
work, and every step is the same problem, so that what was checked is what is timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from benchmarks.harness import HostClock, pairs, summary
from benchmarks.models import build, linears, make_prompts
from benchmarks.step_variants import (
    RIVALS,
    VARIANTS,
    Setting,
    Variant,
    layer_names,
    plain_step,
    total_sq_norm,
    tracked_step,
)
from gradnorm_kernels import dispatch

#: How far squared norms may lie from those of separate backward passes, of the largest; and the checked layers'
#: gradient from plain backward's, by norm. In half precision two ways to one gradient round differently.
NORMS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
#: From a separate forward of each prompt: kernels for another number of rows may add in another order.
NORMS_OTHER_FORWARD = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class StepJobs:
    """Called with {"variant": name} it returns a row; with {"facts": True} what the model is.

    ``settings``: model, layers, dtype, checkpointing, optimizer, prompts, completions, length, tasks, pairs.
    """

    def __init__(self, device: str, settings: dict[str, Any]) -> None:
        self._device, self._settings = torch.device(device), settings
        self._dtype = DTYPES[settings["dtype"]]
        model, sizes = build(
            settings["model"], settings["layers"], self._dtype, self._device, settings["checkpointing"]
        )
        batch = make_prompts(
            settings["prompts"],
            settings["completions"],
            settings["length"],
            settings["tasks"],
            sizes.vocabulary,
            self._device,
        )
        make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings["optimizer"]]
        optimizer = make(model.parameters(), lr=0.0, fused=self._device.type == "cuda")
        self._setting = Setting(model, optimizer, batch)
        self._watch = HostClock(self._now)
        self._truths: dict[str, dict[str, Tensor]] = {}

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        if "facts" in job:
            return self._facts()
        variant = VARIANTS[job["variant"]]
        row: dict[str, Any] = {"variant": variant.name, "what": variant.what, "ours": variant.ours}
        try:
            errors = self._check(variant)
        except AssertionError as error:
            return row | {"status": "wrong", "reason": str(error)}
        except torch.OutOfMemoryError as error:
            return row | {"status": "failed" if variant.ours else "unable", "reason": f"out of memory: {error}"[:300]}
        return row | {"errors": errors} | self._time(variant)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _facts(self) -> dict[str, Any]:
        parameters = self._setting.parameters
        return {
            "parameters": sum(p.numel() for p in parameters),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "tokens": self._setting.batch.tokens.numel(),
            "clock": "of the host, the device synchronised before and after each step",
            "plan": self._plan(),
        }

    def _plan(self) -> str:
        """What the tracker's call for the widest layer would run, and why."""
        batch, samples = self._setting.batch, len(self._setting.batch.prompts)
        modules = [self._setting.model.get_submodule(name) for name in linears(self._setting.model)]
        shapes = [module.get_parameter("weight").shape for module in modules]
        d_out, d_in = max(shapes, key=lambda shape: shape.numel())
        rows, length = batch.tokens.shape
        x, dy = (torch.empty(rows * length, d, dtype=self._dtype, device=self._device) for d in (d_in, d_out))
        ids = torch.arange(samples, device=self._device)
        return str(
            dispatch.explain(
                x,
                dy,
                torch.arange(rows + 1, device=self._device) * length,
                sample_ids=torch.tensor(batch.sample_ids, device=self._device),
                group_ids=ids,
                num_groups=samples,
                weight_grad=True,
                group_gram=True,
            )
        )

    @contextmanager
    def _step(self, variant: Variant) -> Iterator[Callable[[], object]]:
        """The function to time; hooks are there only inside."""
        if variant.layers is not None:
            tracker = gk.GradNormTracker(
                self._setting.model, layer_names(self._setting, variant.layers), fused=variant.fused
            )
            try:
                yield tracked_step(self._setting, tracker)
            finally:
                tracker.close()
        elif variant.rival:
            yield RIVALS[variant.name](self._setting)
        else:
            yield plain_step(self._setting)

    def _time(self, variant: Variant) -> dict[str, Any]:
        count = self._settings["pairs"]
        base = plain_step(self._setting)
        with self._step(variant) as run:
            for _ in range(2):
                base(), run()
            peak, base_peak = self._peak(run), self._peak(base)
            # A variant's own hooks are inert outside its micro-batch, so the baseline runs between its steps.
            mine, plain = pairs(run, base, count, self._watch)
        return {
            "status": "ok",
            "seconds": summary(mine),
            "baseline_seconds": summary(plain),
            "ratio": summary([a / b for a, b in zip(mine, plain, strict=True)]),
            "peak_bytes": peak,
            "baseline_peak_bytes": base_peak,
            "repeats": count,
        }

    def _peak(self, step: Callable[[], object]) -> int | None:
        self._release()
        if self._device.type != "cuda":
            step()
            return None
        torch.cuda.reset_peak_memory_stats(self._device)
        step()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def _release(self) -> None:
        self._setting.optimizer.zero_grad()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, variant: Variant) -> dict[str, float]:
        """Errors of the variant's norms and gradient.

        Raises:
            AssertionError: one is larger than allowed; the text says which.
        """
        if variant.layers is None and not variant.rival:
            return {}
        layers = variant.layers or "linears"
        truths = self._truth(layers)
        if variant.rival and variant.name not in truths:
            raise torch.OutOfMemoryError(f"{variant.name} does not fit")
        found = self._tracker_norms(variant) if variant.ours else truths[variant.name]
        errors = {}
        for rival, expected in truths.items():
            if rival == variant.name:
                continue
            key = f"norms against {rival}"
            errors[key] = float((found - expected).abs().max() / expected.abs().max())
            same_forward = variant.ours and rival == "prompt_backwards"
            self._hold(errors, key, (NORMS if same_forward else NORMS_OTHER_FORWARD)[self._dtype])
        if variant.ours:
            errors["gradient"], noise = self._gradient_error(variant)
            self._hold(errors, "gradient", max(GRADIENT[self._dtype], 3 * noise))
        return errors

    @staticmethod
    def _hold(errors: dict[str, float], key: str, allowed: float) -> None:
        if not errors[key] <= allowed:
            raise AssertionError(f"{key} off by {errors[key]:.1e} (allowed {allowed:.0e})")

    def _modules(self, layers: str) -> list[nn.Module]:
        tracker = gk.GradNormTracker(self._setting.model, layer_names(self._setting, layers))
        tracker.close()
        return [self._setting.model.get_submodule(name) for name in tracker.layers]

    def _truth(self, layers: str) -> dict[str, Tensor]:
        """{rival: ||G_p||^2 [n]} in the parameters of ``layers``."""
        if layers not in self._truths:
            wanted = {id(p) for module in self._modules(layers) for p in module.parameters(recurse=False)}
            at = [i for i, p in enumerate(self._setting.parameters) if id(p) in wanted]
            found: dict[str, Tensor] = {}
            for name, make in RIVALS.items():
                # One that does not fit leaves the other to compare with; it is reported in its own turn.
                with suppress(torch.OutOfMemoryError):
                    found[name] = make(self._setting, lambda gradients: total_sq_norm([gradients[i] for i in at]))()
                self._release()
            if not found:
                raise torch.OutOfMemoryError(
                    f"neither {' nor '.join(RIVALS)} fits, so there is nothing to compare with"
                )
            self._truths[layers] = found
        return self._truths[layers]

    def _tracker_norms(self, variant: Variant) -> Tensor:
        """||G_p||^2 [n]: with every prompt a task of its own, a task's mean squared norm is its prompt's."""
        batch = self._setting.batch
        assert variant.layers is not None
        tracker = gk.GradNormTracker(
            self._setting.model, layer_names(self._setting, variant.layers), fused=variant.fused
        )
        self._setting.optimizer.zero_grad()
        try:
            with tracker.microbatch(batch.sample_ids, batch.sample_ids):
                self._setting.losses().mean().backward()
            stats = tracker.step()
        finally:
            tracker.close()
        return torch.tensor([stats[prompt].mean_sq_norm for prompt in range(len(batch.prompts))], dtype=torch.float64)

    def _gradient_error(self, variant: Variant) -> tuple[float, float]:
        """How far the gradient that the variant's backward left lies from a plain one, in the first and last layer.

        And how far two plain ones lie from each other: attention's backward may add in another order every time.
        """
        assert variant.layers is not None
        modules = self._modules(variant.layers)
        checked = [module.get_parameter("weight") for module in (modules[0], modules[-1])]
        mine = _gradients(checked)
        plain = [self._plain_gradients(checked) for _ in range(2)]
        return _distance(mine, plain[0]), _distance(plain[1], plain[0])

    def _plain_gradients(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        self._setting.optimizer.zero_grad()
        self._setting.losses().mean().backward()
        found = _gradients(parameters)
        self._setting.optimizer.zero_grad()
        return found


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad.double() for parameter in parameters if parameter.grad is not None]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    difference, whole = (
        sum(float(t.square().sum()) for t in ts) for ts in ([x - y for x, y in zip(a, b, strict=True)], b)
    )
    return float((difference / whole) ** 0.5)
