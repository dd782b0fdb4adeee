"""Made-up result files of ``ops`` and ``step``, with known costs: for tests only, nothing here was measured."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import ops, records, step
from benchmarks.batches import LAYERS, make_batch
from benchmarks.harness import summary
from benchmarks.providers import BASELINE, PEERS
from benchmarks.step import DTYPES
from benchmarks.step_variants import MODELS, VARIANTS
from gradnorm_kernels.tuning.costs import Costs

GPU = "NVIDIA Made-up 1"
#: The costs of the made-up kernels, and the ratio of their pass to the plain product.
PLANTED = Costs(0, 0, epilogue=24.0, gram=0.9, gram_token=150.0, pairs=0.6, workspace=1, gram_tile=1)
BASE = 1.02
SECONDS_A_MULTIPLY_ADD = 2.5e-15


def machine(gpu: str = GPU, date: str = "2001-02-03T04:05:06Z") -> dict[str, Any]:
    where = {"cpu": "made up", "cores": 2, "threads": 2, "load_average": None, "system": "made up", "python": "3.11"}
    where |= {"torch": "9.9", "triton": "8.8", "triton_interpreter": False, "gradnorm_kernels": "0", "date": date}
    smi = {"name": gpu, "driver_version": "777.0"}
    card = {"name": gpu, "sm": "9.0", "multiprocessors": 132, "memory_bytes": 1, "l2_bytes": 1, "cuda": "13.0"}
    return where | {"commit": "0123456789ab", "gpu": card | {"nvidia_smi": smi}}


def pairs_of_tokens(length: int, ragged: bool, tokens: int) -> tuple[int, int, int]:
    """(tokens, samples, sum of the squared lengths) of such a batch."""
    batch = make_batch(1, 1, length, max(tokens, length), ragged)
    return len(batch.x), batch.samples, sum(n * n for n in batch.lengths)


def ours(name: str) -> bool:
    return name != BASELINE and name not in PEERS


def does(name: str) -> str:
    return "dW" if name == BASELINE else "norms" if name.endswith("norms") or name == "two_gram" else "dW and norms"


def ratio_of(name: str, row: dict[str, Any], planted: Costs, base: float) -> float:
    """A provider's ratio to dW alone under the planted costs; peers cost a few times dW."""
    weight, width = row["d_in"] * row["d_out"], row["d_in"] + row["d_out"]
    if name == BASELINE:
        return 1.0
    stops = planted.epilogue * row["samples"] / row["tokens"]
    grams = (planted.gram * row["token_pairs"] / row["tokens"] + planted.gram_token) * width / weight
    if name.endswith("gram_norms"):
        return planted.pairs * row["tokens"] * width / weight
    if name.endswith("_gram"):
        return base + grams
    if name.endswith("_wgrad"):
        return base + stops
    return base + min(stops, grams) if ours(name) else 3.0 + 1000 / row["length"]


def spread(middle: float, relative: float) -> list[float]:
    """Forty normally distributed values around a median."""
    normal = statistics.NormalDist()
    return [middle * (1 + relative * normal.inv_cdf((i + 0.5) / 40)) for i in range(40)]


def ops_row(layer: str, length: int, name: str, ratio: float | None, seed: int, **case: Any) -> dict[str, Any]:
    """A row of ops; without a ``ratio``, from the planted costs.

    ``case``: ragged, gram, tokens, dtype, groups. ``noise``: relative spread of the ratios within the row. ``scatter``:
    relative spread of the row's median, drawn with the seed.
    """
    case = {"ragged": False, "gram": False, "tokens": 16384, "dtype": "bf16", "groups": 1, "noise": 0.004} | case
    noise, planted, base = case.pop("noise"), case.pop("planted", PLANTED), case.pop("base", BASE)
    scatter = case.pop("scatter", 0.0)
    tokens, samples, squares = pairs_of_tokens(length, case["ragged"], case["tokens"])
    shape = next((more for more, _, _ in ops.PRESETS["quick"].more if more.name == layer), None) or LAYERS[layer]
    row = {"layer": layer, "d_in": shape.d_in, "d_out": shape.d_out, "length": length, "also": [], **case}
    row |= {"model": shape.model, "provider": name, "does": does(name), "ours": ours(name)}
    row |= {"samples": samples, "tokens": tokens, "token_pairs": squares, "status": "ok"}
    ratio = ratio_of(name, row, planted, base) if ratio is None else ratio
    draw = random.Random(f"{seed} {layer} {length} {name} {sorted(case.items())}")
    work = tokens * shape.d_in * shape.d_out
    plain = spread(work * SECONDS_A_MULTIPLY_ADD, noise)
    ratios = spread(ratio * (1 + scatter * draw.gauss(0, 1)), noise)
    seconds = summary([r * p for r, p in zip(ratios, plain, strict=True)])
    row |= {"seconds": seconds, "yardstick_seconds": summary(plain), "ratio": summary(ratios), "repeats": 40}
    row |= {"errors": {"norms": 1e-6}, "tflops": 2e-12 * work / seconds["median"], "gbps": 800.0}
    row |= {"peak_bytes": 1 << 25, "extra_bytes": 1 << 20}
    if ours(name):
        row["ran"] = {"backend": "cuda" if name.startswith("cuda") else "triton", "gram_tokens": 0, "sums": "wgrad"}
    return row | {"flop_per_byte": work / (tokens * (shape.d_in + shape.d_out) + shape.d_in * shape.d_out)}


def not_ok(row: dict[str, Any], status: str, reason: str) -> dict[str, Any]:
    """The row of a provider that was wrong, failed or unable."""
    measured = ("seconds", "yardstick_seconds", "ratio", "errors", "tflops", "gbps", "flop_per_byte", "repeats")
    return {key: value for key, value in row.items() if key not in measured} | {"status": status, "reason": reason}


def ops_record(rows: Iterable[dict[str, Any]], **where: Any) -> dict[str, Any]:
    ceilings = {"bf16": {"copy_gbps": 4300.0, "product_tflops": 780.0, "product_side": 8192, "dtype": "bfloat16"}}
    made = {"benchmark": "ops", "machine": machine(**where), "settings": {"preset": "quick"}, "ceilings": ceilings}
    return made | {"rows": list(rows), "left": 0}


def grid(
    layers: Iterable[str], kinds: Iterable[tuple[int, bool, bool]], names: Iterable[str], **case: Any
) -> list[Any]:
    """Rows for every layer, kind of batch (length, ragged, gram) and provider."""
    layers, names = list(layers), list(names)
    return [
        ops_row(layer, length, name, None, 1, ragged=ragged, gram=gram, **case)
        for length, ragged, gram in kinds
        for layer in layers
        for name in names
    ]


def step_record(ratios: dict[str, float], model: str = "qwen2.5-3b", **where: Any) -> dict[str, Any]:
    assert model in MODELS and "bf16" in DTYPES
    settings = {"model": model, "dtype": "bf16", "prompts": 4, "completions": 2, "length": 512, "pairs": 20}
    settings |= {"layers": None, "optimizer": "adamw", "checkpointing": False, "tasks": 2}
    rows = []
    for name, ratio in ratios.items():
        found = spread(ratio, 0.001)
        row = {"variant": name, "what": VARIANTS[name].what, "ours": VARIANTS[name].ours, "status": "ok", "errors": {}}
        row |= {"seconds": summary(found), "baseline_seconds": summary([1.0, 1.0]), "ratio": summary(found)}
        if name in step.TARGETS:
            row |= {"target": step.TARGETS[name], "met": ratio <= step.TARGETS[name]}
        rows.append(row | {"peak_bytes": 61 << 30, "baseline_peak_bytes": 60 << 30, "repeats": 40})
    made = {"benchmark": "step", "machine": machine(**where), "settings": settings, "facts": {}}
    return made | {"rows": rows}


def write(path: Path, record: dict[str, Any]) -> Path:
    """Write the record as a file, with the checks of real files."""
    records.write(path, json.loads(json.dumps(record)))
    return path
