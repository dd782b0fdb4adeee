"""Experts of a mixture: every implementation of transformers, every way to accumulate, and what is refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers.integrations import moe

import gradnorm_kernels as gk
from gradnorm_kernels.tracking import experts, parameter_gram
from gradnorm_kernels.tracking.calls import Call, Placement
from gradnorm_kernels.tracking.experts import ExpertsTrace, Product, expert_tokens
from gradnorm_kernels.tracking.formula import Mismatch
from gradnorm_kernels.tracking.layers import Layer, kind_of
from gradnorm_kernels.tracking.parameter_gram import Tokens, weight_sums
from gradnorm_kernels.tracking.rows import make_rows
from gradnorm_kernels.tracking.sketch import MicrobatchSketches, Projections
from tests.tracking.brute_force import sample_gradients, u_statistic
from tests.tracking.measured import TASKS, agree, features, next_token_losses, token_ids
from tests.tracking.models.tiny import tiny_model

ROWS = len(TASKS)
IDS = token_ids()


def model_of(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
    model = tiny_model(name).to(dtype)
    model.config._experts_implementation = implementation
    return model


def leaves(model: nn.Module) -> set[str]:
    """Names of the parameters of experts."""
    return {name for name, _ in model.named_parameters() if ".experts." in name}


@pytest.fixture(params=["eager", "batched_mm", "grouped_mm", "fallback"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "fallback":
        return request.param
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)
    return "grouped_mm"


@pytest.mark.filterwarnings("ignore:not measured:UserWarning")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_implementations(name: str, implementation: str) -> None:
    """U of all parameters against brute force under the same implementation, and gradients that stay the same."""
    wide = implementation != "grouped_mm"  # the grouped product has no float64
    model = model_of(name, implementation, torch.float64 if wide else torch.float32)
    losses = next_token_losses(model, IDS)
    skipped = agree(model, losses, rel=1e-6 if wide else 2e-5)
    assert not set(skipped) & leaves(model) and not any("router" in key or "gate" in key for key in skipped)
    watched = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses(range(ROWS)).mean().backward()
    assert all(map(torch.equal, watched, [p.grad for p in model.parameters()]))


@pytest.mark.parametrize("layers", [r"experts", ["model.layers.1.mlp"]])
def test_experts_and_routers_by_name(layers: str | list[str]) -> None:
    model = model_of("qwen2_moe")
    assert agree(model, next_token_losses(model, IDS), layers) == {}
    tracker = gk.GradNormTracker(model, layers)
    kinds = {kind_of(model.get_submodule(name)) for name in tracker.layers}
    assert kinds == ({"experts"} if isinstance(layers, str) else {"experts", "router", "linear"})
    tracker.close()


def test_several_micro_batches_accumulate_exactly() -> None:
    """Exact sums over micro-batches know the pairs between them: U of one micro-batch of all rows."""
    for name in ("mixtral", "gpt_oss"):
        model = model_of(name)
        losses = next_token_losses(model, IDS)
        found = {}
        for mode, parts in (("pairs", [range(ROWS)]), ("exact", [range(2), range(2, ROWS)])):
            tracker = gk.GradNormTracker(model, "experts$", accumulate=mode)
            for part in parts:
                with tracker.microbatch([TASKS[row] for row in part], [f"sample {row}" for row in part]):
                    losses(part).mean().backward()
            found[mode] = tracker.step()
            tracker.close()
        for task in "ab":
            assert found["exact"][task].n == found["pairs"][task].n
            for number in ("sq_norm", "plug_in", "mean_sq_norm"):
                got, want = (getattr(found[mode][task], number) for mode in ("exact", "pairs"))
                assert got == pytest.approx(want, rel=1e-6), (name, number)


@pytest.mark.filterwarnings("ignore:not measured:UserWarning")
@pytest.mark.parametrize("width", [4, 16])
def test_sketches_project_the_matrices_one_below_the_other(width: int) -> None:
    """``C_rows^T G C_columns / sqrt(r_rows r_columns)`` of each sample's G [E d_out, d_in]; d_in of a bias is 1."""
    model = model_of("gpt_oss")
    losses = next_token_losses(model, IDS)
    projections = Projections(width, 0)
    sketches = MicrobatchSketches(make_rows(TASKS, None, None, None, None, serial=0, max_blocks=9), projections)
    tracker = gk.GradNormTracker(model, "experts$", accumulate="sketch", sketch_width=width)
    tracker._accumulation.microbatch = lambda rows: sketches  # type: ignore[method-assign]
    with tracker.microbatch(TASKS):
        losses(range(ROWS)).mean().backward()
    tracker.close()
    assert sketches._found.keys() == leaves(model)
    for name, sketch in sketches._found.items():
        parameter = model.get_parameter(name)
        for row in range(ROWS):
            grad = torch.autograd.grad(losses([row])[0], [parameter])[0]
            matrix = grad.mT.flatten(0, 1) if grad.dim() == 3 else grad.reshape(-1, 1)
            for of, along in zip(projections.of(name, tuple(matrix.shape), (), matrix), (0, 1), strict=True):
                if of is not None:
                    matrix = (of.T @ matrix if along == 0 else matrix @ of) / of.shape[1] ** 0.5
            assert float((matrix - sketch.values[row]).norm()) <= 1e-6 * float(matrix.norm())


@pytest.mark.parametrize("mode", ["pairs", "exact", "sketch"])
def test_experts_that_two_layers_share(mode: str) -> None:
    """A matrix that two calls use: its uses are summed before they are squared."""
    model = model_of("qwen3_moe")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    options = {"sketch_width": 256} if mode == "sketch" else {}
    assert agree(model, next_token_losses(model, IDS), "experts$", accumulate=mode, **options) == {}


def test_a_second_forward_in_a_micro_batch() -> None:
    model = model_of("olmoe")
    single = next_token_losses(model, IDS)

    def losses(rows: range) -> Tensor:
        return single(rows) + 0.3 * single(rows).square()

    assert agree(model, losses, "experts$|gate$") == {}


def test_the_step_after_the_first_is_right_too() -> None:
    """Formula and totals are verified in the first step; the second is measured without."""
    model = model_of("llama4_text")
    assert agree(model, next_token_losses(model, IDS), "experts$|router$", steps=2) == {}


def test_autocast() -> None:
    """In bfloat16: the parameters pass their verification, and U is near that of brute force without autocast."""
    model = model_of("mixtral", dtype=torch.float32)
    losses = next_token_losses(model, IDS)
    tracker = gk.GradNormTracker(model, "experts$")
    with tracker.microbatch(TASKS), torch.autocast("cpu", torch.bfloat16):
        losses(range(ROWS)).mean().backward()
    stats = tracker.step()
    assert tracker.skipped == {}
    tracker.close()
    parameters = [p for key, p in model.named_parameters() if key in leaves(model)]
    g = torch.stack([sample_gradients(losses([row]), [row], parameters)[row] for row in range(ROWS)])
    for task in "ab":
        own = g[[row for row, other in enumerate(TASKS) if other == task]]
        size = float(own.square().sum(1).mean())
        assert stats[task].mean_sq_norm == pytest.approx(size, rel=0.2)
        assert stats[task].sq_norm == pytest.approx(u_statistic(own), abs=0.2 * size)


class Experts(nn.Module):
    """Four experts of one matrix each and a router, on [B, L, 8]: ``products(x [T, 8], expert [T])`` is the forward."""

    class MoeExperts(nn.Module):
        def __init__(self, products: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 7, 8, dtype=torch.float64))
            self._products = products

        def forward(self, x: Tensor, expert: Tensor) -> Tensor:
            return self._products(x, expert, self.up_proj)

    def __init__(self, products: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 8, dtype=torch.float64)
        self.experts = self.MoeExperts(products)
        self.head = nn.Linear(7, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(0, 1)
        expert = (10 * x.detach()).long().sum(1) % 4
        return self.head(self.experts(x, expert)).unflatten(0, (-1, 6)).mean(1)


def class_losses(model: nn.Module) -> Callable[[range], Tensor]:
    x = features()

    def losses(rows: range) -> Tensor:
        rows = list(rows)
        return nn.functional.cross_entropy(model(x[rows]), torch.arange(ROWS)[rows] % 3, reduction="none")

    return losses


def loop(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 7)
    for e in expert.unique().tolist():
        at = (expert == e).nonzero()[:, 0]
        out = out.index_add(0, at, x[at] @ matrices[e].T)
    return out


def halves(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
    """Two halves of the tokens one after the other: an expert's matrix is in two products."""
    order = torch.arange(len(x)).view(2, -1)
    return torch.cat([loop(x[part], expert[part], matrices) for part in order])


def masked(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
    """All tokens at every expert, in place selection by a mask."""
    return sum((expert == e)[:, None] * nn.functional.linear(x, m) for e, m in enumerate(matrices.unbind()))


def batched(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), matrices[expert].transpose(1, 2)).squeeze(1)


@pytest.mark.parametrize("products", [loop, halves, masked, batched], ids=lambda f: f.__name__)
def test_ways_to_multiply(products: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    model = Experts(products)
    assert agree(model, class_losses(model)) == {}


def by_einsum(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
    return torch.einsum("tod,td->to", matrices[expert], x)


def summed(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
    """An operation that keeps rows apart here, but could add them up as well."""
    return batched(x.cumsum(1), expert, matrices)


def in_a_table(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
    return batched(x, expert, matrices.flip(0))


@pytest.mark.parametrize(
    ("products", "reason"),
    [
        (by_einsum, "up_proj is used by einsum, which is not followed"),
        (summed, "which tokens up_proj is multiplied with cannot be followed"),
        (in_a_table, "up_proj is used by flip, which is not followed"),
        (lambda x, expert, matrices: x[:, :7] * 2, "no product with up_proj was seen"),
    ],
    ids=["einsum", "cumsum", "flip", "none"],
)
def test_what_is_not_followed_is_named(products: Callable[[Tensor, Tensor, Tensor], Tensor], reason: str) -> None:
    model = Experts(products)
    with pytest.warns(UserWarning, match=reason):
        skipped = agree(model, class_losses(model))
    assert set(skipped) == {"experts.up_proj"} and reason in skipped["experts.up_proj"]
    tracker = gk.GradNormTracker(model, ["experts"])
    message = f"'experts' .MoeExperts. cannot be measured: {reason}"
    with pytest.raises(RuntimeError, match=message), tracker.microbatch(TASKS):
        class_losses(model)(range(ROWS)).mean().backward()
    assert _get_current_function_mode_stack() == []
    tracker.close()


def overwritten(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
    rows = x.clone()
    y = batched(rows, expert, matrices)
    rows.add_(1)
    return y


def test_an_input_that_is_changed_after_its_product_is_refused() -> None:
    model = Experts(overwritten)
    tracker = gk.GradNormTracker(model, "all")
    message = "up_proj of layer 'experts' was modified in place"
    with pytest.raises(RuntimeError, match=message), tracker.microbatch(TASKS):
        class_losses(model)(range(ROWS)).mean().backward()
    tracker.close()


def test_the_formula_is_checked() -> None:
    """A product whose output is not the matrix of that expert times the tokens."""
    model = Experts(loop)
    x = torch.randn(6, 8, dtype=torch.float64)

    class Wrong(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            return 1.01 * out if getattr(func, "__name__", "") == "linear" else out

    for wrong in (False, True):
        trace = ExpertsTrace(Layer("experts", model.experts, "experts"), x, verify=True)
        if wrong:
            with Wrong(), trace:
                nn.functional.linear(x, model.experts.up_proj[2])
            with pytest.raises(Mismatch, match="up_proj is not up_proj.expert. times its tokens"):
                trace.finish()
        else:
            with trace:
                nn.functional.linear(x, model.experts.up_proj[2])
            trace.finish()
            assert [product.experts for product in trace.products] == [2]


def test_compiled_experts_are_named() -> None:
    """Compiled code cannot be followed: the experts are left out, and everything else is measured."""
    torch._dynamo.reset()
    model = Experts(loop)
    run = torch.compile(model, backend="aot_eager")
    tracker = gk.GradNormTracker(model, "all")
    with pytest.warns(UserWarning, match="torch.compile compiles its forward"), tracker.microbatch(TASKS):
        class_losses(run)(range(ROWS)).mean().backward()
    assert set(tracker.skipped) == {"experts.up_proj"} and _get_current_function_mode_stack() == []
    assert tracker.step()["a"].n == TASKS.count("a")
    tracker.close()


@pytest.mark.filterwarnings("ignore:not measured:UserWarning")
def test_expert_parallelism_is_refused_by_name() -> None:
    model = model_of("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts._is_expert_parallel = True
    skipped = agree(model, next_token_losses(model, IDS))
    assert set(skipped) == leaves(model)
    assert all("spread over ranks" in reason for reason in skipped.values())


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_a_forward_that_raises_leaves_nothing_behind(error: type[BaseException]) -> None:
    def products(x: Tensor, expert: Tensor, matrices: Tensor) -> Tensor:
        if fail:
            raise error("in the middle")
        return loop(x, expert, matrices)

    fail = False
    model = Experts(products)
    losses = class_losses(model)
    tracker = gk.GradNormTracker(model, "all")
    with tracker.microbatch(TASKS):
        losses(range(ROWS)).mean().backward()
    fail = True
    with pytest.raises(error), tracker.microbatch(TASKS):
        losses(range(ROWS))
    assert _get_current_function_mode_stack() == []
    with tracker.microbatch(TASKS):  # caught inside the block, which goes on
        for now in (True, True, False):
            fail = now
            with contextlib.suppress(error):
                losses(range(ROWS)).mean().backward()
    assert _get_current_function_mode_stack() == []
    assert tracker.skipped == {}
    tracker.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    fail = False
    assert agree(model, losses) == {}


def test_experts_share_calls_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are those of one call per expert, with other factors for rows of one sample; NaN stays in its sample."""
    rows = make_rows(
        ["a", "b", "a", "b"], ["p", "q", "p", "r"], None, [1.0, 2.0, 3.0, 4.0], None, serial=0, max_blocks=9
    )
    torch.manual_seed(0)
    expert, row, lengths = torch.tensor([0, 0, 2, 5, 5, 5]), torch.tensor([0, 3, 1, 0, 1, 2]), [2, 1, 3, 1, 1, 2]
    x, dy = torch.randn(10, 5, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    scale = rows.scale[row]
    tokens = Tokens(x, dy, torch.tensor(lengths), rows.row_sample[row], scale, False, expert)
    grads = torch.zeros(3, 6, 3, 5, dtype=torch.float64)
    at = 0
    for e, sample, factor, length in zip(expert, rows.row_sample[row], scale, lengths, strict=True):
        grads[sample, e] += factor * dy[at : at + length].T @ x[at : at + length]
        at += length
    flat = grads.flatten(1)
    calls = []
    inner = parameter_gram._linear_sums
    monkeypatch.setattr(parameter_gram, "_linear_sums", lambda *args: calls.append(args) or inner(*args))
    for most, count in ((256, 1), (6, 2), (1, 3)):
        calls.clear()
        monkeypatch.setattr(parameter_gram, "_TOKENS", most)
        sums = weight_sums([tokens], rows)
        assert len(calls) == count
        torch.testing.assert_close(sums.gram, flat @ flat.T)
        torch.testing.assert_close(sums.sample_sq, flat.square().sum(1))
    spoiled = dy.clone()
    spoiled[2] = float("nan")  # of sample r
    gram = weight_sums([tokens._replace(dy=spoiled)], rows).gram
    assert gram[2, 2].isnan() and torch.equal(gram[:2, :2], weight_sums([tokens], rows).gram[:2, :2])


def test_copies_to_the_host_are_waited_for_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may lie on several GPUs: an event of the current one says nothing of the others' copies."""
    asked, waited = [], []
    event = SimpleNamespace(synchronize=lambda: waited.append(True))
    stream = SimpleNamespace(record_event=lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.append(device) or stream)
    monkeypatch.setattr(experts, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(Product, "_pinned", staticmethod(torch.clone))
    tokens = torch.arange(3, device="meta")
    product = Product("weight", tokens, tokens, tokens, False)
    product.to_host()
    assert asked == [tokens.device] and not waited
    product.wait()
    assert waited


def test_tokens_are_sorted_by_expert_and_row() -> None:
    """Tokens with a zero dy are left out, and each (expert, row) is one entry."""
    module = Experts(loop).experts
    x = torch.arange(6.0)[:, None].expand(6, 8)
    placement = Placement(0, whole=False)
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    call = Call(Layer("experts", module, "experts"), x, (), {}, placement, torch.tensor([1, 0]), scale)
    assert call.row_of_tokens().tolist() == [0, 0, 0, 1, 1, 1]
    tokens = torch.tensor([5, 0, 3, 1, 4, 2])
    dy = torch.ones(6, 7)
    dy[3] = 0
    product = Product("up_proj", x[tokens], tokens, torch.tensor([3, 1, 1, 1, 3, 3]), False)
    found = expert_tokens(call, product, dy, "up_proj")
    assert found.expert.tolist() == [1, 1, 3, 3]
    assert found.row_sample.tolist() == [1, 0, 1, 0] and found.scale.tolist() == [2.0, 3.0, 2.0, 3.0]
    assert found.lengths.tolist() == [1, 1, 1, 2]
    assert found.x[:, 0].tolist() == [0.0, 3.0, 2.0, 5.0, 4.0]
    assert [(expert, own.x[:, 0].tolist()) for expert, own in found.by_expert()] == [
        (1, [0.0, 3.0]),
        (3, [2.0, 5.0, 4.0]),
    ]
