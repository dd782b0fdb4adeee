"""docs/models.md, from the models of the test: what the tracker measures in each architecture and what it leaves out.

``python -m tests.tracking.models.table`` writes the page, with names of models the lines of these.
``tests/tracking/test_architectures.py`` holds it to what the tracker does.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import gradnorm_kernels as gk
from tests.tracking.models.architecture import Architecture
from tests.tracking.models.tiny import MODELS, losses_of, tiny_model

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
COMMAND = "python -m tests.tracking.models.table"

#: What the tracker's reasons have in common -> the words of the table. The first that fits.
REASONS = (
    (r"^linears, embeddings, routers", None),  # no formula: see KINDS
    (r"does not depend on the rows", "shared by all rows"),
    (r"changes in other rows too", "rows depend on each other"),
    (r"parameters of its own beside", "a parameter of its own beside weight and bias"),
    (r"none of its uses was a call of its layer", "used without a call of its layer"),
    (r"differs from autograd's", "also used outside its layer"),
    (r"does not run row by row", "rows depend on each other"),
    (r"its output (is|cannot)", "a forward of its own"),
    (r"called without a tensor", "called without a tensor"),
    (r"(how often it is called|with how many tokens)", "its tokens depend on the data"),
    (r"could (each )?be", "its rows could be in several dimensions"),
    (r"must be the \d+ rows", "its rows were not found"),
)
#: What a parameter without a formula is, by its name.
KINDS = (
    (r"experts?\b", "experts' weights in one tensor"),
    (r"conv|patch_embed", "a convolution"),
    (r"(gate|router)\.(weight|bias)$", "a router without an nn.Linear"),
    (r"", "a module that is no linear, embedding or norm"),
)

TEXT = """# Models

What is measured in each architecture of transformers, on tiny models with random weights. The page is written by
`{command}` and held to the code by `tests/tracking/test_architectures.py`, which compares the
estimates with brute force over every parameter that is not left out: for the default layers and for `layers="all"`,
watched and fused, without padding and with padding on either side, with both kinds of gradient checkpointing where
transformers supports it. Watching changes no bit of the gradients.

*default measures*: the projections that `layers="last_attention"` chooses, here in models of two layers. A model
without softmax attention is refused with a message that names layers that can be measured.

*"all" leaves out*: the parameters that `layers="all"` lists in `tracker.skipped`, with their share of the trainable
parameters of the tiny model (in a large model the share is another one) and the reason; `*` stands for a number.
[verification.md](verification.md) explains the reasons.

| architecture | default measures | "all" leaves out | why |
|---|---|---|---|
{rows}

Notes:

- The experts of a mixture are one tensor with a matrix per expert. It is measured under `eager`, `batched_mm` and
  `grouped_mm`. [verification.md](verification.md#experts) says what is not followed.
- The patches that a vision tower sees belong to rows, which the probe finds. Its convolution is left out.
- The weights of models that are not in the table are verified in the same way; see `tracker.skipped_reasons`.
"""


def _reason(name: str, text: str) -> str:
    for pattern, words in REASONS:
        if re.search(pattern, text):
            return words or next(kind for part, kind in KINDS if re.search(part, name))
    return text


def _default(architecture: Architecture) -> str:
    if not architecture.at:
        return "refused: no softmax attention"
    if architecture.refused:
        return f"refused: {architecture.refused}"
    return f"`{architecture.at}`: {architecture.parts.replace(' ', ', ')}"


def row(name: str, tracker: gk.GradNormTracker) -> str:
    """One line of the table, from a tracker with ``layers="all"`` after a micro-batch."""
    groups: dict[str, list[str]] = {}
    for key, reason in tracker.skipped_reasons.items():
        shape = re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
        known = groups.setdefault(_reason(key, reason), [])
        if shape not in known:
            known.append(shape)
    share = sum(tracker.skipped.values())
    reasons = sorted(groups)
    left_out = "; ".join(", ".join(f"`{key}`" for key in sorted(groups[reason])) for reason in reasons)
    cells = [f"{left_out} ({share:.1%})", "; ".join(reasons)] if groups else ["nothing", ""]
    return f"| {name} | {_default(MODELS[name])} | {cells[0]} | {cells[1]} |"


def main(names: Sequence[str]) -> None:
    """Measure these models, or all, and write the page; lines of the others stay."""
    from tests.tracking.test_architectures import RUNS, measure

    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise SystemExit(f"no model is called {unknown[0]!r}; there are {', '.join(MODELS)}")
    known = {line.split(" | ")[0].strip("| "): line for line in PAGE.read_text().splitlines() if line[:2] == "| "}
    for name in names or MODELS:
        model = tiny_model(name)
        _, tracker = measure(model, RUNS[0], losses_of(model, name, RUNS[0].padding))
        known[name] = row(name, tracker)
        print(known[name], flush=True)
    PAGE.write_text(TEXT.format(command=COMMAND, rows="\n".join(known[name] for name in MODELS if name in known)))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
