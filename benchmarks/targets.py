"""The performance targets in one list, and the verdicts from result files: met, missed by how much, or not measured.

A target is judged by its worst row: the largest median among the rows that it applies to. A target with a row that was
wrong or failed has no verdict. Noise is the baseline measured against itself in the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import cpu_ratio, step
from benchmarks.providers import BASELINE
from benchmarks.step_variants import PLAIN

Row = dict[str, Any]
Record = dict[str, Any]
#: The providers that are judged in ``ops``: the defaults, and the one-pass wgrad of each GPU backend.
WAYS = ("auto", "triton_wgrad", "cuda_wgrad")
MIB = 2**20
#: dW and norms in one pass relative to dW alone: by tokens per sample at d 4096, and for widths of 576 to 1536.
BY_LENGTH, SMALL = {256: 1.10, 1024: 1.05, 2048: 1.00}, 1.10
#: Above this share of late calls the verdict says so: the GPU began them before the host had launched all of the call.
LATE = 0.1
#: The target of small layers applies from this length on.
SMALL_LENGTH = 256


@dataclass(frozen=True)
class Measured:
    """A row, its record, and the noise: the ratio of the baseline to itself for the same batch, or None."""

    row: Row
    record: Record
    noise: Row | None

    @property
    def name(self) -> str:
        return str(self.row.get("provider", self.row.get("variant")))

    @property
    def status(self) -> str:
        return str(self.row.get("status", "ok"))

    @property
    def on_gpu(self) -> bool:
        return "gpu" in self.record["machine"]


@dataclass(frozen=True)
class Target:
    """``what`` may cost at most ``limit``; each of ``ways``, providers or variants, is judged separately.

    ``about``: whether the target applies to a row. ``figure``: lower quartile, median and upper quartile of the limited
    quantity, or None if the row lacks it. ``memory``: the limit is in MiB; other limits are ratios.
    """

    what: str
    limit: float
    benchmark: str
    ways: tuple[str, ...]
    about: Callable[[Measured], bool]
    figure: Callable[[Row], tuple[float, float, float] | None]
    memory: bool = False


def _ratio(row: Row) -> tuple[float, float, float] | None:
    found = row["ratio"]
    return found["q1"], found["median"], found["q3"]


def _cpu_ratio(row: Row) -> tuple[float, float, float] | None:
    return row["lower_quartile"], row["ratio"], row["upper_quartile"]


def _extra(row: Row) -> tuple[float, float, float] | None:
    extra = row.get("extra_bytes")
    return None if extra is None else (extra / MIB,) * 3


def _plain_call(found: Measured) -> bool:
    """On a GPU in bfloat16: samples of one length, one group, no inner products."""
    row = found.row
    one_group = not row["ragged"] and not row.get("gram") and row.get("groups", 1) == 1
    return found.on_gpu and row["dtype"] == "bf16" and one_group


def _square_4096(least: int, below: float) -> Callable[[Measured], bool]:
    def about(found: Measured) -> bool:
        row = found.row
        return _plain_call(found) and row["d_in"] == row["d_out"] == 4096 and least <= row["length"] < below

    return about


def _small(found: Measured) -> bool:
    row = found.row
    return _plain_call(found) and is_small(row["d_in"], row["d_out"]) and row["length"] >= SMALL_LENGTH


def is_small(d_in: int, d_out: int) -> bool:
    """Whether the target of small layers applies."""
    return 576 <= min(d_in, d_out) and max(d_in, d_out) <= 1536


def _large_batch(found: Measured) -> bool:
    row = found.row
    return _plain_call(found) and row["layer"].startswith("llama-3.1-8b.") and row["tokens"] >= 1 << 16


def _whole_model(found: Measured) -> bool:
    settings = found.record["settings"]
    whole = {"model": "qwen2.5-3b", "layers": None, "dtype": "bf16", "optimizer": "adamw", "checkpointing": False}
    return found.on_gpu and all(settings.get(name) == value for name, value in whole.items())


def _cpu(narrow: bool) -> Callable[[Measured], bool]:
    return lambda found: not found.on_gpu and not found.row["ragged"] and (found.row["d"] <= cpu_ratio.SMALL) == narrow


TARGETS = (
    Target(
        "dW and norms, d 4096, 2048 tokens per sample and more",
        BY_LENGTH[2048],
        "ops",
        WAYS,
        _square_4096(2048, 1e9),
        _ratio,
    ),
    Target("the same, 1024 tokens", BY_LENGTH[1024], "ops", WAYS, _square_4096(1024, 1025), _ratio),
    Target("the same, 256 tokens", BY_LENGTH[256], "ops", WAYS, _square_4096(256, 257), _ratio),
    Target("the same, both widths 576 to 1536, 256 tokens and more", SMALL, "ops", WAYS, _small, _ratio),
    Target(
        "memory besides dW, layers of Llama-3.1-8B, 65536 tokens", 16, "ops", WAYS, _large_batch, _extra, memory=True
    ),
    *(
        Target(f"a training step of Qwen2.5-3B, {layers}", limit, "step", (name,), _whole_model, _ratio)
        for name, limit, layers in (
            ("linears", step.TARGETS["linears"], "every linear layer observed"),
            ("linears_fused", step.TARGETS["linears_fused"], "every linear layer, fused"),
            ("last_attention", step.TARGETS["last_attention"], "the last attention observed"),
            ("last_attention_fused", step.TARGETS["last_attention_fused"], "the last attention, fused"),
        )
    ),
    *(
        Target(f"dW and norms on a CPU, d {widths}", limit, "cpu_ratio", ("auto",), _cpu(narrow), _cpu_ratio)
        for widths, limit, narrow in (
            ("1024 and more", cpu_ratio.TARGET, False),
            ("576", cpu_ratio.TARGET_SMALL, True),
        )
    ),
)


@dataclass(frozen=True)
class Verdict:
    """``measured``: the worst row's figure with its spread and case, or ""."""

    target: Target
    way: str  # with the chosen backend in brackets
    measured: str
    noise: str
    text: str


def measured(records: Iterable[Record]) -> list[Measured]:
    """All rows of the records; of two rows for one case, the later record's."""
    found: dict[tuple[Any, ...], Measured] = {}
    for record in sorted(records, key=lambda record: str(record["machine"]["date"])):
        noise = {
            _case(row): row["ratio"]
            for row in record["rows"]
            if row.get("provider", row.get("variant")) in (BASELINE, PLAIN) and row.get("status", "ok") == "ok"
        }
        for row in record["rows"]:
            name = row.get("provider", row.get("variant"))
            # In a step file the settings describe the case.
            about = str(record["settings"]) if record["benchmark"] == "step" else ""
            case = (record["benchmark"], about, name, *_case(row))
            found[case] = Measured(row, record, noise.get(_case(row)))
    return list(found.values())


def _case(row: Row) -> tuple[Any, ...]:
    """The fields that two rows of one batch share."""
    names = ("layer", "d_in", "d_out", "d", "length", "ragged", "gram", "groups", "tokens", "dtype")
    return tuple(row.get(name) for name in names)


def verdicts(rows: list[Measured], benchmarks: Iterable[str] = ("ops", "step", "cpu_ratio")) -> list[Verdict]:
    """One verdict per target of those benchmarks and way."""
    return [
        judge(target, way, rows) for target in TARGETS if target.benchmark in set(benchmarks) for way in target.ways
    ]


def judge(target: Target, way: str, rows: list[Measured]) -> Verdict:
    """The verdict on a target from the rows."""
    own = [
        found
        for found in rows
        if found.record["benchmark"] == target.benchmark and found.name == way and target.about(found)
    ]
    for status in ("wrong", "failed"):
        bad = [found for found in own if found.status == status]
        if bad:
            reason = str(bad[0].row["reason"]).split(" (allowed")[0][:80]
            return Verdict(target, way, "", "", f"no verdict: {len(bad)} of {len(own)} {status} ({reason})")
    figures = [(target.figure(found.row), found) for found in own if found.status == "ok"]
    there = [(figure, found) for figure, found in figures if figure is not None]
    if not there:
        reasons = [str(found.row["reason"])[:80] for found in own if found.status == "unable"]
        return Verdict(target, way, "", "", f"not measured: {reasons[0]}" if reasons else "not measured")
    (low, middle, high), worst = max(there, key=lambda pair: pair[0][1])
    chosen = worst.row.get("ran") if way == "auto" else None
    way += f" ({chosen['backend']})" if chosen else ""
    if target.memory:
        text = f"{middle:.1f} MiB"
    else:
        text = f"{middle:.3f} ({low:.3f}–{high:.3f})"
    text += f", worst of {len(there)}: {_where(worst)}" if len(there) > 1 else f", {_where(worst)}"
    if worst.row.get("late", 0.0) > LATE:
        text += f"; the GPU waited for the host in {worst.row['late']:.0%} of the calls"
    missed = middle - target.limit
    noise = worst.noise
    said = "met"
    if missed > 0:
        said = f"missed by {missed:.1f} MiB" if target.memory else f"missed by {missed:.3f}"
        if noise is not None and not target.memory and missed <= max(noise["q3"] - 1, 1 - noise["q1"]):
            said += ", less than the noise"
    shown = "" if noise is None or target.memory else f"{noise['q1']:.3f}–{noise['q3']:.3f}"
    return Verdict(target, way, text, shown, said)


def _where(found: Measured) -> str:
    row = found.row
    if found.record["benchmark"] == "step":
        settings = found.record["settings"]
        return f"{settings['prompts']} × {settings['completions']} rows of {settings['length']} tokens"
    shape = row["layer"] if "layer" in row else f"d {row['d']}"
    return f"{shape} at {row['length']} of {row['tokens']} tokens"
