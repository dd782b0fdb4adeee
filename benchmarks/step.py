"""``python -m benchmarks step``: what the tracker costs in a whole training step, and what the same costs without it.

    python -m benchmarks step                                   # Qwen2.5-3B's sizes, random weights, bf16; on a GPU
    python -m benchmarks step --checkpointing --length 2048
    python -m benchmarks step --model smollm2-135m --device cpu --pairs 3
    python -m benchmarks step --dry-run                         # every step on a tiny model, on a CPU

A step is forward, backward and optimizer step on n prompts with several completions each. Every variant is timed in
pairs with the plain step; its norms are first compared with those of one backward per prompt. By default it needs about
60 GiB (estimated, not measured): parameters, gradients and AdamW's two moments of 3.1 billion parameters in bf16 are
23 GiB, the rest are activations and logits of 4096 tokens. --checkpointing, --layers, --optimizer sgd and a smaller
--model need less.

Status 0: every variant of ours was right and timed. Status 1: one of ours was wrong, raised, crashed or hung.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from benchmarks import records
from benchmarks.harness import HostClock, LostError, Worker, pairs, summary
from benchmarks.ops import device_of, out_of
from benchmarks.records import machine
from benchmarks.step_variants import (
    MODELS,
    PLAIN,
    RIVALS,
    VARIANTS,
    Setting,
    Variant,
    build,
    layer_names,
    linears,
    make_prompts,
    plain_step,
    total_sq_norm,
    tracked_step,
)
from gradnorm_kernels import dispatch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
#: The largest allowed ratio to the plain step, at the sizes of a 3-billion-parameter model on a GPU.
TARGETS = {"last_attention": 1.005, "last_attention_fused": 1.005, "linears": 1.03, "linears_fused": 1.03}
ON_GPU: dict[str, Any] = {
    "model": "qwen2.5-3b",
    "dtype": "bf16",
    "prompts": 4,
    "completions": 2,
    "length": 512,
    "pairs": 20,
}
ON_CPU: dict[str, Any] = {"model": "tiny", "dtype": "fp32", "prompts": 4, "completions": 2, "length": 32, "pairs": 3}
#: Allowed errors of squared norms against separate backward passes, relative to the largest; and of the checked layers'
#: gradient against plain backward, by norm. In half precision two ways to compute one gradient round differently.
NORMS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
#: Against a separate forward per prompt: kernels for another number of rows may add in another order.
NORMS_OTHER_FORWARD = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
#: What projections may add to one prompt's squared norm: they are unbiased, with an error of their own.
SKETCHED = 0.5
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="the tiny model on a CPU, in float32")
    parser.add_argument("--quick", action="store_true", help="six pairs of steps per variant")
    parser.add_argument("--model", choices=list(MODELS), help="default: qwen2.5-3b on a GPU, tiny on a CPU")
    parser.add_argument("--layers", type=int, help="decoder layers; default: the model's")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw", help="default: adamw")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in every decoder layer")
    parser.add_argument("--prompts", type=int, help="samples per step; default 4")
    parser.add_argument("--completions", type=int, help="rows per prompt; default 2")
    parser.add_argument("--length", type=int, help="tokens per row; default 512 on a GPU, 32 on a CPU")
    parser.add_argument("--tasks", type=int, default=2, help="tasks of the prompts; default 2")
    parser.add_argument("--pairs", type=int, help="timed steps of each variant; default 20 on a GPU, 3 on a CPU")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--patience", type=float, default=300, help="seconds after which a variant counts as hung")
    parser.add_argument("--minutes", type=float, help="start no variant after so long")
    parser.add_argument("--commit", help="for the record, if this is no git checkout")
    parser.add_argument("--out", type=Path, help="result file; default: one in benchmarks/results/")


def settings_of(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """The settings that the child process needs.

    Raises:
        ValueError: a size below 1, or a single prompt, for which U is undefined.
    """
    settings = dict(ON_GPU if device == "cuda" else ON_CPU)
    settings |= {key: getattr(options, key) for key in settings if getattr(options, key) is not None}
    if options.quick and options.pairs is None:
        settings["pairs"] = min(6, settings["pairs"])
    for key in ("prompts", "length", "pairs"):
        if settings[key] < 2:
            raise ValueError(f"--{key} must be at least 2, got {settings[key]}")
    if min(settings["completions"], options.tasks, options.layers or 1) < 1:
        raise ValueError("--completions, --tasks and --layers must be at least 1")
    return settings | {key: getattr(options, key) for key in ("layers", "optimizer", "checkpointing", "tasks")}


def run(options: argparse.Namespace) -> int:
    """Measure, print and write. Returns the exit status.

    Raises:
        ValueError: a size is below its minimum, or the device is not available.
    """
    device = device_of(options.device, options.dry_run)
    settings = settings_of(options, device)
    names = options.variants or list(VARIANTS)
    where = machine(device, options.commit)
    out = out_of(options.out, "step", where, options.dry_run)
    record: dict[str, Any] = {"benchmark": "step", "machine": where, "settings": settings, "facts": {}, "rows": []}
    print(f"{where.get('gpu', {}).get('name') or where['cpu']}, torch {where['torch']}; results in {out}")
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    print(_HEAD)

    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    with Worker(StepJobs, (device, settings), options.patience) as worker:
        for number, name in enumerate(names):
            if time.monotonic() > deadline:
                record["left"] = names[number:]
                print(f"no time left for {', '.join(names[number:])}")
                break
            try:
                record["facts"] = record["facts"] or worker({"facts": True})
                row = worker({"variant": name})
            except (LostError, RuntimeError) as error:
                variant = VARIANTS[name]
                row = {"variant": name, "what": variant.what, "ours": variant.ours}
                row |= {"status": "failed", "reason": str(error)}
            if device == "cuda" and settings["model"] == "qwen2.5-3b" and row["status"] == "ok" and name in TARGETS:
                row |= {"target": TARGETS[name], "met": row["ratio"]["median"] <= TARGETS[name]}
            record["rows"].append(row)
            print(_line(row), flush=True)
            records.write(out, record)
    if device == "cuda":
        record["machine_after"] = machine(device, options.commit)
    records.write(out, record)
    bad = [row for row in record["rows"] if row["status"] in ("wrong", "failed") and (row["ours"] or _base(row))]
    return 1 if bad or not record["rows"] else 0


_HEAD = (
    f"{'variant':<21} {'of plain':>8} {'quartiles':>13} {'s a step':>9} {'peak GiB':>9} {'more GiB':>9} {'error':>7}"
)


def _base(row: dict[str, Any]) -> bool:
    return bool(row["variant"] == PLAIN)


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['variant']:<21} {row['status'].upper()}: {row['reason']}"
    ratio, peak = row["ratio"], row["peak_bytes"]
    memory = f"{'':>9} {'':>9}"
    if peak is not None:
        memory = f"{peak / 2**30:>9.2f} {(peak - row['baseline_peak_bytes']) / 2**30:>9.2f}"
    error = f"{max(row['errors'].values()):>7.0e}" if row["errors"] else ""
    target = f"  target {row['target']:.3f} {'met' if row['met'] else 'missed'}" if "target" in row else ""
    return (
        f"{row['variant']:<21} {ratio['median']:>8.4f} {ratio['q1']:>6.3f} {ratio['q3']:>6.3f} "
        f"{row['seconds']['median']:>9.4f} {memory} {error}{target}"
    )


def reset_resident_peak() -> bool:
    """Let the kernel count this process's peak of resident memory from here. False where it cannot."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps have freed does not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def resident_peak() -> int:
    """The process's peak of resident memory since :func:`reset_resident_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


class StepJobs:
    """What measures, in the child process: {"variant": name} -> a row; {"facts": True} -> facts about the model.

    A variant is checked against the ways without the tracker, then timed in pairs with the plain step. The optimizer's
    learning rate is 0: it does all its work, and every step is the problem that was checked.

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
        """What the tracker's call runs for the widest layer, and why."""
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
        """The function to time; hooks exist only inside the context."""
        if variant.layers is not None:
            tracker = self._tracker(variant)
            try:
                yield tracked_step(self._setting, tracker)
            finally:
                tracker.close()
        elif variant.rival:
            yield RIVALS[variant.name](self._setting)
        else:
            yield plain_step(self._setting)

    def _tracker(self, variant: Variant) -> gk.GradNormTracker:
        assert variant.layers is not None
        names = layer_names(self._setting, variant.layers)
        return gk.GradNormTracker(
            self._setting.model, names, fused=variant.fused, accumulate=variant.accumulate, errors=variant.errors
        )

    def _time(self, variant: Variant) -> dict[str, Any]:
        count = self._settings["pairs"]
        base = plain_step(self._setting)
        with self._step(variant) as run:
            for _ in range(2):
                base(), run()
            peak, base_peak = self._peak(run), self._peak(base)
            # The tracker's hooks do nothing outside its micro-batch, so the plain step can run between its steps.
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
        """Bytes: of a GPU what torch allocates at most, of a CPU the process's resident memory (Linux; else None)."""
        self._release()
        if self._device.type != "cuda":
            watched = reset_resident_peak()
            step()
            return resident_peak() if watched else None
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
            allowed = (NORMS if same_forward else NORMS_OTHER_FORWARD)[self._dtype]
            self._hold(errors, key, SKETCHED if variant.accumulate == "sketch" else allowed)
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
                # If one does not fit, the other is compared with; its own row reports it.
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
        """||G_p||^2 [n]: where every prompt is its own task, a task's mean squared norm is its prompt's."""
        batch = self._setting.batch
        tracker = self._tracker(variant)
        self._setting.optimizer.zero_grad()
        try:
            with tracker.microbatch(batch.sample_ids, batch.sample_ids):
                self._setting.losses().mean().backward()
            stats = tracker.step()
        finally:
            tracker.close()
        return torch.tensor([stats[prompt].mean_sq_norm for prompt in range(len(batch.prompts))], dtype=torch.float64)

    def _gradient_error(self, variant: Variant) -> tuple[float, float]:
        """The error of the variant's gradient against plain backward, in the first and last measured layer.

        And the difference of two plain backward passes: attention's backward may add in another order every time.
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
