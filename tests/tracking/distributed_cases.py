"""What each rank of a distributed test runs: ``python -m tests.tracking.distributed_cases CASES RANK WORLD FOLDER``.

Every case builds the same small Llama in float64 on every rank, gives each rank its share of one global batch, and
compares what the tracker says with one process that sees the ranks' batches as micro-batches.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradnorm_kernels as gk

PROMPTS, GROUP, LENGTH = 8, 2, 7
TASKS = ["add", "sort", "sort", "add", "add", "sort", "add", "sort"]


def build() -> Any:
    """The model, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        tie_word_embeddings=False,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).to(torch.float64)


def tokens() -> Tensor:
    """[PROMPTS * GROUP, LENGTH]: the global batch, GROUP rows a prompt."""
    return torch.randint(0, 41, (PROMPTS * GROUP, LENGTH), generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over the rows of their mean token loss."""
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def share(rank: int, world: int) -> list[int]:
    """The rows of the global batch that a rank has: whole prompts, in unequal numbers."""
    bounds = [round(PROMPTS * (i / world) ** 0.8) for i in range(world + 1)]
    return list(range(bounds[rank] * GROUP, bounds[rank + 1] * GROUP))


def measure(tracker: gk.GradNormTracker, model: nn.Module, rows: list[int], **more: Any) -> None:
    """One micro-batch of these rows of the global batch."""
    prompts = [row // GROUP for row in rows]
    with tracker.microbatch([TASKS[p] for p in prompts], prompts, **more):
        loss_of(model, tokens()[rows]).backward()


def expected(layers: Any, micro_batches: list[list[int]], **more: Any) -> gk.StepStats:
    """What one process says of these micro-batches."""
    model = build()
    tracker = gk.GradNormTracker(model, layers, process_group=None, **more)
    for rows in micro_batches:
        measure(tracker, model, rows)
    return tracker.step()


def same(found: gk.StepStats, right: gk.StepStats, tolerance: float = 1e-9) -> None:
    """Equal estimates, whatever the order of the tasks."""
    assert set(found) == set(right), (found.tasks, right.tasks)
    for task in right:
        a, b = found[task], right[task]
        assert (a.n, a.n_effective, a.std_error_method) == (b.n, b.n_effective, b.std_error_method), (a, b)
        for name in ("sq_norm", "std_error", "noise_scale", "plug_in", "mean_sq_norm", "pair_weight"):
            x, y = getattr(a, name), getattr(b, name)
            assert abs(x - y) <= tolerance * abs(y) or (x != x and y != y), (task, name, x, y)
    order = [found.tasks.index(task) for task in right.tasks]
    for name in ("inner_products", "inner_products_se", "cosines", "cosines_se"):
        x, y = getattr(found, name)[order][:, order], getattr(right, name)
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


def gradients(model: nn.Module) -> list[Tensor]:
    """The parameters' gradients, this rank's part of sharded ones."""
    found = [p.grad for p in model.parameters()]
    return [(g.to_local() if hasattr(g, "to_local") else g).clone() for g in found if g is not None]


def ddp(rank: int, world: int) -> None:
    """DistributedDataParallel, watching and fused, with unequal shares; every rank has the same numbers."""
    from torch.nn.parallel import DistributedDataParallel

    right = expected("last_attention", [share(i, world) for i in range(world)])
    kept = []
    for mode in (None, False, True):
        model = DistributedDataParallel(build())
        if mode is None:
            loss_of(model, tokens()[share(rank, world)]).backward()
        else:
            tracker = gk.GradNormTracker(model, "last_attention", fused=mode)
            measure(tracker, model, share(rank, world))
            stats = tracker.step()
            same(stats, right)
            assert tracker.running[stats.tasks[0]].n == stats[stats.tasks[0]].n
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, (stats.tasks, [stats[task] for task in stats.tasks]))
            assert all(repr(other) == repr(everyone[0]) for other in everyone)
        kept.append(gradients(model))
    assert all(map(torch.equal, kept[0], kept[1])), "watching changed a gradient"
    for a, b in zip(kept[0], kept[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def errors(rank: int, world: int) -> None:
    """A task is one block over all ranks: the same numbers as in one process, without errors from ranks as folds."""
    for how in ("tasks", "steps"):
        right = expected("all", [share(i, world) for i in range(world)], errors=how)
        model = build()
        tracker = gk.GradNormTracker(model, "all", errors=how)
        measure(tracker, model, share(rank, world))
        same(tracker.step(), right)
        assert right["add"].std_error_method == "none"
    tracker = gk.GradNormTracker(model, "last_attention", errors=("tasks", "steps")[rank % 2])
    measure(tracker, model, share(rank, world))
    try:
        tracker.step()
    except RuntimeError as error:
        assert "errors ['steps', 'tasks']" in str(error), error
    else:
        raise AssertionError("ranks with different errors= were not refused")


def fsdp(rank: int, world: int) -> None:
    """FSDP2 with every layer, norms and embeddings included; the tracker made before and after sharding."""
    from torch.distributed.fsdp import fully_shard

    right = expected("all", [share(i, world) for i in range(world)])
    kept = []
    for mode in ("without", "before", "after", "fused"):
        model = build()
        tracker = gk.GradNormTracker(model, "all") if mode == "before" else None
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if mode in ("after", "fused"):
            tracker = gk.GradNormTracker(model, "all", fused=mode == "fused")
        if tracker is None:
            loss_of(model, tokens()[share(rank, world)]).backward()
        else:
            measure(tracker, model, share(rank, world))
            same(tracker.step(), right)
        kept.append(gradients(model))
    for other in kept[1:3]:
        assert all(map(torch.equal, kept[0], other)), "watching changed a gradient"
    for a, b in zip(kept[0], kept[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def fsdp_units(rank: int, world: int) -> None:
    """FSDP2 of units that return a measured layer's own output: when its gradient arrives they are still sharded."""
    from torch.distributed.fsdp import fully_shard

    layers = ["model.embed_tokens", "model.layers.0.self_attn", "model.layers.1.mlp", "lm_head"]
    right = expected(layers, [share(i, world) for i in range(world)])
    for before in (True, False):
        model = build()
        tracker = gk.GradNormTracker(model, layers) if before else None
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp, layer):
                fully_shard(part)
        for part in [model.model.embed_tokens, model.lm_head] * before:  # a layer that is a unit by itself
            fully_shard(part)
        fully_shard(model)
        tracker = tracker or gk.GradNormTracker(model, layers)
        measure(tracker, model, share(rank, world))
        same(tracker.step(), right)


def measure_packed(tracker: gk.GradNormTracker, model: nn.Module, rows: list[int]) -> None:
    """One micro-batch of the first 3 to 7 tokens of these rows, packed into one row with two tokens of padding."""
    parts = [tokens()[row][: 3 + row % 5] for row in rows]
    offsets = [0, *accumulate(map(len, parts))]
    ids = torch.cat([*parts, torch.zeros(2, dtype=torch.long)])
    positions = torch.cat([*(torch.arange(len(part)) for part in parts), torch.zeros(2, dtype=torch.long)])
    prompts = [row // GROUP for row in rows]
    with tracker.microbatch([TASKS[p] for p in prompts], prompts, cu_seqlens=offsets):
        logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        losses = [nn.functional.cross_entropy(logits[a : b - 1], ids[a + 1 : b]) for a, b in pairwise(offsets)]
        torch.stack(losses).mean().backward()


def packed(rank: int, world: int) -> None:
    """Packed rows under DistributedDataParallel and FSDP2; the ranks' sequences differ in lengths and number."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = build()
    single = gk.GradNormTracker(model, "all", process_group=None)
    for other in range(world):
        measure_packed(single, model, share(other, world))
    right = single.step()
    for mode in ("ddp", "fsdp", "fsdp, fused"):
        model = build()
        if mode == "ddp":
            wrapped: nn.Module = DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                fully_shard(layer)
            wrapped = fully_shard(model)
        tracker = gk.GradNormTracker(wrapped, "all", fused=mode == "fsdp, fused")
        measure_packed(tracker, wrapped, share(rank, world))
        same(tracker.step(), right)
        assert not tracker.skipped


def exact(rank: int, world: int) -> None:
    """accumulate="exact": micro-batches of one prompt on every rank, unequally many, and all pairs count."""
    right = expected("all", [list(range(PROMPTS * GROUP))])
    model = build()
    tracker = gk.GradNormTracker(model, "all", accumulate="exact")
    rows = share(rank, world)
    for first in range(0, len(rows), GROUP):
        measure(tracker, model, rows[first : first + GROUP])
    found = tracker.step()
    for task in right:
        assert found[task].n == right[task].n
        for name in ("sq_norm", "plug_in", "noise_scale", "mean_sq_norm", "pair_weight"):
            a, b = getattr(found[task], name), getattr(right[task], name)
            assert abs(a - b) <= 1e-8 * abs(b), (task, name, a, b)
    order = [found.tasks.index(task) for task in right.tasks]
    torch.testing.assert_close(found.inner_products[order][:, order], right.inner_products, rtol=1e-8, atol=1e-10)
    assert not tracker.step(), "the sums were reset"


def sketch(rank: int, world: int) -> None:
    """accumulate="sketch": one prompt per rank, a prompt spread over ranks, a rank without any: all pairs count."""
    for width in (64, 4):  # without and with projections
        options = {"accumulate": "sketch", "sketch_width": width}
        model = build()
        tracker = gk.GradNormTracker(model, "all", **options)
        single = gk.GradNormTracker(build(), "all", process_group=None, **options)
        prompt = list(range(rank * GROUP, (rank + 1) * GROUP))
        measure(tracker, model, prompt)
        for other in range(world):
            measure(single, single._model, list(range(other * GROUP, (other + 1) * GROUP)))
        same(tracker.step(), single.step(), 1e-8)
        mine = [row for row in range(PROMPTS * GROUP) if row % world == rank]
        if rank != 1:
            measure(tracker, model, mine, rows_per_sample=GROUP)
        for other in range(world):
            if other != 1:
                rows = [row for row in range(PROMPTS * GROUP) if row % world == other]
                measure(single, single._model, rows, rows_per_sample=GROUP)
        found = tracker.step()
        same(found, single.step(), 1e-8)
        assert found.accumulate == "sketch" and sum(gradient.n for gradient in found.values()) == PROMPTS
    if world > 1:
        said = ""
        try:
            measure(tracker, model, list(range(GROUP)), rows_per_sample=GROUP)  # the same whole prompt on every rank
            tracker.step()
        except ValueError as error:
            said = str(error)
        assert "times the rows of sample 0 were seen over all ranks" in said, said


def automatic(rank: int, world: int) -> None:
    """accumulate="auto": one prompt per rank is seen in the first step, and every rank chooses the same."""

    def one_task(tracker: gk.GradNormTracker, model: nn.Module, rows: list[int]) -> None:
        with tracker.microbatch(["add"] * len(rows), [row // GROUP for row in rows]):
            loss_of(model, tokens()[rows]).backward()

    alone, model = build(), build()
    single = gk.GradNormTracker(alone, accumulate="pairs", process_group=None)
    one_task(single, alone, list(range(world * GROUP)))
    right = single.step()["add"]
    tracker = gk.GradNormTracker(model, memory_budget=0 if world == 2 else 1 << 20)
    for mode in ("sketch", "sketch" if world == 2 else "exact"):
        one_task(tracker, model, list(range(rank * GROUP, (rank + 1) * GROUP)))
        found = tracker.step()
        assert found.accumulate == mode, found.accumulate
        # No side of this model is wider than the projections.
        assert found["add"].n == right.n == world
        assert abs(found["add"].sq_norm - right.sq_norm) <= 1e-6 * abs(right.sq_norm), (found, right)


def unbiased(rank: int, world: int) -> None:
    """One prompt per rank, whose mean gradient is known: the mean of U over many steps within its error."""
    torch.manual_seed(0)
    model = nn.Linear(24, 20, bias=False)
    mean = 0.3 * torch.randn(20, 24) / 24**0.5
    tracker = gk.GradNormTracker(nn.Sequential(model), "all", accumulate="sketch", sketch_width=12)
    generator = torch.Generator().manual_seed(rank)
    found = []
    for _ in range(300):
        x = torch.randn(1, 24, generator=generator)
        target = x @ mean.T + torch.randn(1, 20, generator=generator) / 4
        with tracker.microbatch(["t"], [0]):
            (model(x) * target).sum().backward()
        found.append(tracker.step()["t"].sq_norm)
    u = torch.tensor(found, dtype=torch.float64)
    error = float(u.std()) / len(u) ** 0.5
    assert abs(float(u.mean()) - float(mean.square().sum())) < 4 * error, (u.mean(), mean.square().sum(), error)


def spread(rank: int, world: int) -> None:
    """A prompt's rows on two ranks: its pairs with itself do not count, and it is one prompt."""
    model = build()
    tracker = gk.GradNormTracker(model)
    mine = [row for row in range(PROMPTS * GROUP) if row % world == rank]
    measure(tracker, model, mine, rows_per_sample=GROUP)
    found = tracker.step()
    alone = build()
    right = gk.GradNormTracker(alone, process_group=None)
    for other in range(world):
        rows = [row for row in range(PROMPTS * GROUP) if row % world == other]
        measure(right, alone, rows, rows_per_sample=GROUP)
    same(found, right.step())
    assert {task: g.n for task, g in found.items()} == {"add": 4, "sort": 4}


def uneven(rank: int, world: int) -> None:
    """Ranks without a micro-batch take part, and a rank's own number for a prompt means that rank's prompt."""
    model = build()
    tracker = gk.GradNormTracker(model)
    if rank == 0:
        measure(tracker, model, list(range(8)))
    same(tracker.step(), expected("last_attention", [list(range(8))]))
    with tracker.microbatch(["add"] * 4, [0, 0, 1, 1]):
        loss_of(model, tokens()[4 * rank : 4 * rank + 4]).backward()
    assert tracker.step()["add"].n == 2 * world
    local = gk.GradNormTracker(model, process_group=None)
    with local.microbatch(["add"] * 4, [0, 0, 1, 1]):
        loss_of(model, tokens()[:4]).backward()
    assert local.step()["add"].n == 2


def tensor_parallel(rank: int, world: int) -> None:
    """Column- and row-wise shards of the attention's projections add up; every rank has the same rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,))
    rows = list(range(PROMPTS * GROUP))
    half = len(rows) // 2
    for mode in ("pairs", "exact", "sketch"):
        right = expected("last_attention", [rows[:half], rows[half:]], accumulate=mode)
        model = build()
        attention = model.model.layers[-1].self_attn
        plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": RowwiseParallel()}
        parallelize_module(attention, mesh, plan)
        tracker = gk.GradNormTracker(model, accumulate=mode, process_group=None)
        for part in (rows[:half], rows[half:]):
            measure(tracker, model, part)
        same(tracker.step(), right)
    tracker.close()
    fused = gk.GradNormTracker(model, fused=True, process_group=None)
    said = ""
    try:
        measure(fused, model, rows)
    except ValueError as error:
        said = str(error)
    assert "sharded over ranks" in said and "fused=False" in said, said


def tensor_and_data_parallel(rank: int, world: int) -> None:
    """Shards of a matrix on half of the ranks each; in the first step half of them have no micro-batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    rows = list(range(PROMPTS * GROUP))
    for mode in ("pairs", "exact", "sketch"):
        model = build()
        plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": RowwiseParallel()}
        parallelize_module(model.model.layers[-1].self_attn, mesh["tensor"], plan)
        tracker = gk.GradNormTracker(model, accumulate=mode, process_group=mesh["data"].get_group())
        for _ in range(2):
            if mesh["data"].get_local_rank() == 0:
                measure(tracker, model, rows)
            same(tracker.step(), expected("last_attention", [rows], accumulate=mode))


def sequence_parallel(rank: int, world: int) -> None:
    """Tokens of one sample on several ranks are refused by the layer's name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,))
    norm = nn.Sequential(nn.LayerNorm(6))
    parallelize_module(norm, mesh, {"0": SequenceParallel()})
    tracker = gk.GradNormTracker(norm, "all", process_group=None)
    said = ""
    try:
        with tracker.microbatch(["a", "b"]):
            norm(torch.randn(2, 4, 6)).to_local().sum().backward()
    except ValueError as error:
        said = str(error)
    assert "'0'" in said and "sequence or context parallelism" in said, said


def dies(rank: int, world: int) -> None:
    """One rank stops before its step; the others must not wait for ever."""
    model = build()
    tracker = gk.GradNormTracker(model)
    measure(tracker, model, share(rank, world))
    if rank == 1:
        sys.exit(3)
    tracker.step()


CASES = {
    case.__name__: case
    for case in (
        ddp,
        errors,
        fsdp,
        fsdp_units,
        packed,
        exact,
        sketch,
        automatic,
        unbiased,
        spread,
        uneven,
        tensor_parallel,
        tensor_and_data_parallel,
        sequence_parallel,
        dies,
    )
}


def main() -> None:
    """Run the cases in order; the exit code is 1 at the first that fails, with its traceback."""
    names, rank, world, folder = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for name in names:
        CASES[name](rank, world)
        print(f"passed {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
