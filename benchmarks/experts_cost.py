"""What measuring the experts of a mixture costs: time and peak memory of a step, beside the plain step.

    python -m benchmarks.experts_cost

Random Qwen3-MoE models on the CPU: few experts with many tokens each, and many experts with few. Each line is a process
of its own. Time is the median of later micro-batches; memory is the process's peak. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
import warnings

#: name -> (sizes, rows, tokens per row)
CASES = {
    "8 experts": ({"num_experts": 8, "moe_intermediate_size": 256}, 16, 64),
    "128 experts": ({"num_experts": 128, "moe_intermediate_size": 64}, 16, 64),
}
SIZES = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 4}
#: What is measured -> the tracker's layers; None: nothing.
LAYERS = {"plain": None, "all but experts": "^(?!.*experts)(?=.)", "all": "all"}
REPEATS = 5


def measure(case: str, implementation: str, layers: str | None) -> tuple[float, float]:
    """(median seconds of a forward and backward, peak memory of this process in MiB)."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import gradnorm_kernels as gk

    warnings.simplefilter("ignore")
    size, rows, tokens = CASES[case]
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **size, max_position_embeddings=256))
    model.config._experts_implementation = implementation
    ids = torch.randint(0, SIZES["vocab_size"], (rows, tokens))

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        chosen = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        (-chosen.mean(1).mean()).backward()
        model.zero_grad()

    tracker = None if layers is None else gk.GradNormTracker(model, layers, unverified="skip")
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        if tracker is None:
            step()
        else:
            with tracker.microbatch(["a", "b"] * (rows // 2)):
                step()
        seconds.append(time.perf_counter() - began)
        if tracker is not None:
            tracker.step()
    return statistics.median(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.experts_cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    for case in CASES:
        for implementation in ("eager", "grouped_mm"):
            plain = None
            for name, layers in LAYERS.items():
                with context.Pool(1) as pool:
                    seconds, memory = pool.apply(measure, (case, implementation, layers))
                plain = plain or (seconds, memory)
                print(
                    f"{case}, {implementation}, {name}: {seconds:.3f} s ({seconds / plain[0]:.2f} of the plain step), "
                    f"{memory - plain[1]:+.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
