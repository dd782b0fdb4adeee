"""``python -m benchmarks step``: what measuring costs a whole training step, and what doing without us would cost.

    python -m benchmarks step                                   # Qwen2.5-3B's sizes, random weights, bf16; on a GPU
    python -m benchmarks step --checkpointing --length 2048
    python -m benchmarks step --model smollm2-135m --device cpu --pairs 3
    python -m benchmarks step --dry-run                         # every step on a tiny model, on a CPU

A step is forward, backward and optimizer step on n prompts with several completions each. Every variant is timed in
turn with the plain step; its norms are first compared with those of one backward a prompt. By default the whole takes
about 60 GiB (reckoned, not measured): parameters, gradients and AdamW's two moments of 3.1 billion parameters in bf16
are 23 GiB, the rest are activations and logits of 4096 tokens. --checkpointing, --layers, --optimizer sgd and a
smaller --model take less.

Status 0: everything of ours was right and timed. Status 1: something of ours was wrong, raised, crashed or hung.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.isolate import LostError, Worker
from benchmarks.machine import machine
from benchmarks.models import MODELS
from benchmarks.ops import device_of, out_of
from benchmarks.step_jobs import DTYPES, StepJobs
from benchmarks.step_variants import BASELINE, VARIANTS

#: How much slower a step may be at the sizes of a 3-billion-parameter model, on a GPU.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="the tiny model on a CPU, in float32")
    parser.add_argument("--quick", action="store_true", help="six pairs of steps a variant")
    parser.add_argument("--model", choices=list(MODELS), help="default: qwen2.5-3b on a GPU, tiny on a CPU")
    parser.add_argument("--layers", type=int, help="decoder layers; default: the model's")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in every decoder layer")
    parser.add_argument("--prompts", type=int, help="samples a step; default 4")
    parser.add_argument("--completions", type=int, help="rows a prompt; default 2")
    parser.add_argument("--length", type=int, help="tokens a row; default 512 on a GPU, 32 on a CPU")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--pairs", type=int, help="timed steps of each variant; default 20 on a GPU, 3 on a CPU")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--patience", type=float, default=300, help="seconds after which a variant counts as hung")
    parser.add_argument("--minutes", type=float, help="begin no variant after so long")
    parser.add_argument("--commit", help="for the record, where this is no git checkout")
    parser.add_argument("--out", type=Path, help="result file; default: one in benchmarks/results/")


def settings_of(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """What the child needs to know.

    Raises:
        ValueError: a size that is none, or one prompt, which has no U.
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
    """Measure, print and write; the status to exit with.

    Raises:
        ValueError: sizes that are none, or a device that is not there.
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
    return bool(row["variant"] == BASELINE)


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
