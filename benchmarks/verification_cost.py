"""What verification costs: the first micro-batch of a tracker and later ones, as multiples of the plain step's time.

    python -m benchmarks.verification_cost

Two random Llamas on the CPU: a tiny one, and one of SmolLM2-135M's shape. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradnorm_kernels as gk

SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
TINY = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
#: name -> (configuration, rows, tokens per row, repetitions)
CASES = {"tiny": (TINY, 16, 64, 7), "smollm2": (SMOLLM2, 8, 48, 3)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.verification_cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the tracker's warning about skipped parameters
    for name, (size, rows, tokens, repeats) in CASES.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **size))
        ids = torch.randint(0, size["vocab_size"], (rows, tokens))
        mask, tasks = torch.ones_like(ids), ["a", "b"] * (rows // 2)

        def step(model: LlamaForCausalLM = model, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            chosen = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
            (-chosen.mean(1).mean()).backward()
            model.zero_grad()

        step()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        plain = statistics.median(seconds)
        for layers in ("last_attention", "all"):
            tracker = gk.GradNormTracker(model, layers)
            ratios = []
            for _ in range(1 + repeats):
                began = time.perf_counter()
                with tracker.microbatch(tasks, attention_mask=mask):
                    step()
                ratios.append((time.perf_counter() - began) / plain)
                tracker.step()
            tracker.close()
            later = statistics.median(ratios[1:])
            print(f"{name}, {layers}: plain {plain:.3f} s, first {ratios[0]:.2f}, later {later:.2f}", flush=True)


if __name__ == "__main__":
    main()
