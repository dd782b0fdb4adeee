"""The cost of the norms on a CPU: fused_grad_norm with dW against torch's own dW GEMM, next to its peers.

    python -m benchmarks.cpu_ratio                         # the shapes of the targets
    python -m benchmarks.cpu_ratio --d 1024 --lengths 64 96 --ragged --providers auto torch cpu two_gram bmm

Each row is checked against the float64 reference before it is timed; a wrong result ends the run with status 1 and no
speed. Times are of pairs run back to back; the table shows the median ratio and its quartiles. Status 0 says that the
run completed; whether the targets were met is in the table. ``--clock cpu`` (one thread) counts processor time, which a
busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.batches import make_batch, truth
from benchmarks.harness import quartiles, ratios
from benchmarks.providers import BASELINE, PROVIDERS, WrongResultError, gate
from benchmarks.records import RESULTS, machine
from gradnorm_kernels import backends

#: The largest allowed ratio to dW alone; the second up to the width SMALL.
TARGET, TARGET_SMALL, SMALL = 1.15, 1.2, 576


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_ratio", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[576, 1024, 2048, 4096], help="d_in = d_out")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048], help="tokens per sample"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per batch")
    parser.add_argument("--ragged", action="store_true", help="samples of half to one and a half times the length")
    names = [name for name in PROVIDERS if name != BASELINE]
    parser.add_argument(
        "--providers", nargs="+", default=["auto"], choices=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs per shape (default: 15)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice; 1 with --clock cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of what passes, or of the process")
    parser.add_argument("--out", type=Path, help=f"JSON file; default: one in {RESULTS.name}/ named by date")
    options = parser.parse_args(arguments)
    if options.threads or options.clock == "cpu":
        torch.set_num_threads(options.threads or 1)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter

    where = machine()
    rows: list[dict[str, object]] = []
    print(f"{where['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.clock} time")
    print(f"{'d':>5} {'tokens per sample':>17} {'provider':<10} {'of dW':>6} {'quartiles':>13} {'target':>7}")
    for d in options.d:
        for length in options.lengths:
            batch = make_batch(d, d, length, max(options.tokens, length), options.ragged)
            expected = truth(batch)
            for name in options.providers:
                provider = PROVIDERS[name]
                reason = provider.unavailable_reason(batch)
                if reason is not None:
                    print(f"{d:>5} {length:>17} {name:<10} {reason}")
                    continue
                try:
                    gate(provider, batch, expected)
                except WrongResultError as error:
                    print(f"not timed: {error}", file=sys.stderr)
                    return 1
                base = PROVIDERS[BASELINE].prepare(batch)
                low, median, high = quartiles(ratios(provider.prepare(batch), base, options.repeats, clock))
                # The targets are for calls that leave the algorithm open, on any backend.
                has_target = provider.ours and name in ("auto", *backends.NAMES)
                target = (TARGET_SMALL if d <= SMALL else TARGET) if has_target else None
                verdict = "" if target is None else f"{target:>7.2f} {'met' if median <= target else 'missed'}"
                print(f"{d:>5} {length:>17} {name:<10} {median:>6.3f} {low:>6.3f} {high:>6.3f} {verdict}", flush=True)
                row: dict[str, object] = {
                    "d": d,
                    "length": length,
                    "ragged": options.ragged,
                    "tokens": len(batch.x),
                    "provider": name,
                    "ran": provider.ran(batch) if provider.ran else None,
                }
                row |= {"ratio": median, "lower_quartile": low, "upper_quartile": high, "repeats": options.repeats}
                rows.append(row | {"target": target, "met": None if target is None else median <= target})
    out = options.out or RESULTS / f"cpu_ratio-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": "cpu_ratio", "clock": options.clock, "machine": where, "rows": rows}
    out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
