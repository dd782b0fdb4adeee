"""The cpu backend: every instruction set this machine has, against the float64 reference; threads, memory, refusals."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gradnorm_kernels as gk
from gradnorm_kernels import backends, dispatch, traps
from gradnorm_kernels.backends import native
from gradnorm_kernels.backends.cpu import wgrad
from gradnorm_kernels.backends.torch.wgrad import Span, segmented_wgrad
from gradnorm_kernels.tolerances import NORMS, WEIGHT_GRAD

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"no compiled module: {native.unavailable_reason()}"
)

ROOT = Path(__file__).resolve().parents[2]
INFO = native.build_info()
ISAS = [i for i in range(len(INFO["cpu_isas"])) if native.module().runs_isa(i)] if INFO else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
isas = pytest.mark.parametrize("isa", ISAS, ids=lambda i: INFO["cpu_isas"][i])


def runs_of(lengths: list[list[int]], every: int = 3) -> list[list[Span]]:
    """Groups of spans; every third is not measured."""
    count = iter(range(10**6))
    return [[Span(length, next(count) % every != 2) for length in group] for group in lengths]


def batch(runs: list[list[Span]], d_in: int, d_out: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(d_in + d_out)
    tokens = sum(span.tokens for run in runs for span in run)
    return tuple(torch.randn(tokens, d, generator=generator).to(dtype) for d in (d_in, d_out))


def test_the_machine_has_an_instruction_set_and_the_best_is_taken():
    assert ISAS[0] == 0, "the portable one runs everywhere"
    assert native.module().best_isa() == ISAS[-1]


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch: pytest.MonkeyPatch):
    """Every call has scratch memory of its own, which is full of NaN where a test asks for that."""
    monkeypatch.setattr(wgrad, "_SCRATCH", threading.local())
    monkeypatch.setattr(wgrad, "_MOST_KEPT", 0)


@isas
@pytest.mark.parametrize("trap", traps.TRAPS, ids=str)
def test_traps(trap: traps.Trap, isa: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wgrad, "segmented_wgrad", functools.partial(wgrad.segmented_wgrad, isa=isa))
    traps.check(trap.build(torch.float32), "cpu", "wgrad")
    for dtype in DTYPES:
        traps.check(trap.build(dtype), "cpu", "wgrad", runs=1, weight_grad=True, group_gram=True)


@isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [1, 3000, 1 << 30])
@pytest.mark.parametrize(
    "lengths",
    [
        [[1]],
        [[2000]],
        [[512, 512, 513]],
        [[700, 1, 2, 600], [5]],
        [[3] * 50, [1100], [40, 777, 40], [1]],
    ],
    ids=str,
)
def test_segmented_wgrad(lengths: list[list[int]], workspace: int, dtype: torch.dtype, isa: int):
    """Blocks that are cut inside a sample, groups of one, blocks of one row, with and without each output."""
    runs = runs_of(lengths)
    d_in, d_out = 71, 38
    x, dy = batch(runs, d_in, d_out, dtype)
    right = torch.empty(d_out, d_in, dtype=torch.float64)
    expected = segmented_wgrad(x.double(), dy.double(), runs, 1 << 30, right, True)
    for weight_grad, group_gram in ((True, True), (True, False), (False, True), (False, False)):
        with traps.poisoned_memory():
            total = torch.empty(d_out, d_in, dtype=dtype) if weight_grad else None
            found = wgrad.segmented_wgrad(x, dy, runs, workspace, total, group_gram, None, isa, 2)
        torch.testing.assert_close(found.sample_sq, expected.sample_sq, rtol=NORMS[dtype], atol=0)
        torch.testing.assert_close(found.group_sq, expected.group_sq, rtol=NORMS[dtype], atol=0)
        if total is not None:
            traps.assert_close(total.double(), right, WEIGHT_GRAD[dtype])
        assert (found.gram is None) == (not group_gram)
        if found.gram is not None and expected.gram is not None:
            scale = expected.group_sq.sqrt().outer(expected.group_sq.sqrt())
            traps.assert_close(found.gram, expected.gram, NORMS[dtype], scale)


@isas
def test_the_same_bits_for_any_number_of_threads_and_every_time(isa: int):
    runs = runs_of([[32] * 20, [777, 1, 1000], [64] * 5])
    x, dy = batch(runs, 200, 333)
    first = None
    for threads in (1, 2, 3, 2, 16):
        with traps.poisoned_memory():
            total = torch.empty(333, 200)
            found = wgrad.segmented_wgrad(x, dy, runs, 20_000, total, False, None, isa, threads)
        results = (found.sample_sq, found.group_sq, total)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True)), f"{threads} threads"


@isas
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (97, 53), (200, 333)])
@pytest.mark.parametrize("groups", [1, 2, 5, 31, 32, 33])
def test_inner_products_of_groups(groups: int, d_in: int, d_out: int, isa: int):
    """Taken inside the pass for few groups, from stored sums for more; the same for any number of threads."""
    runs = runs_of([[3, 40 + k, 1] if k % 2 else [20 + k] for k in range(groups)])
    x, dy = batch(runs, d_in, d_out)
    right = torch.empty(d_out, d_in, dtype=torch.float64)
    expected = segmented_wgrad(x.double(), dy.double(), runs, 1 << 30, right, True)
    scale = expected.group_sq.sqrt().outer(expected.group_sq.sqrt())
    for weight_grad in (True, False):
        first = None
        for threads in (1, 2, 3):
            with traps.poisoned_memory():
                total = torch.empty(d_out, d_in) if weight_grad else None
                found = wgrad.segmented_wgrad(x, dy, runs, 5000, total, True, None, isa, threads)
            assert found.gram is not None and expected.gram is not None
            traps.assert_close(found.gram, expected.gram, NORMS[torch.float32], scale)
            assert torch.equal(found.gram, found.gram.T)
            if total is not None:
                traps.assert_close(total.double(), right, WEIGHT_GRAD[torch.float32])
            first = first or found
            assert torch.equal(found.gram, first.gram) and torch.equal(found.sample_sq, first.sample_sq)


@isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 5])
def test_inner_products_of_a_wide_weight(groups: int, dtype: torch.dtype, isa: int, monkeypatch: pytest.MonkeyPatch):
    """Several passes over its rows, each with packed operands of all tokens; one where they would be too many."""
    runs = runs_of([[3, 40 + k, 1] for k in range(groups)])
    x, dy = batch(runs, 97, 130, dtype)
    right = torch.empty(130, 97, dtype=torch.float64)
    expected = segmented_wgrad(x.double(), dy.double(), runs, 1 << 30, right, True)
    scale = expected.group_sq.sqrt().outer(expected.group_sq.sqrt())
    module, passes = native.module(), []
    counted = {"segmented_wgrad": lambda **given: passes.append(given["d_out"]) or module.segmented_wgrad(**given)}
    others = {name: getattr(module, name) for name in dir(module) if name not in counted and not name.startswith("_")}
    monkeypatch.setattr(wgrad.native, "module", lambda: SimpleNamespace(**counted, **others))
    for packed, fewest, heights in ((97 + 47, 1, [44, 44, 42]), (97 + 47, 48, [130]), (96, 1, [130])):
        monkeypatch.setattr(wgrad, "_MOST_PACKED", packed * len(x))
        monkeypatch.setattr(wgrad, "_FEWEST_ROWS", fewest)
        for weight_grad in (True, False):
            with traps.poisoned_memory():
                total = torch.empty(130, 97, dtype=dtype) if weight_grad else None
                found = wgrad.segmented_wgrad(x, dy, runs, 1 << 30, total, True, None, isa, 2)
            assert passes == heights
            passes.clear()
            torch.testing.assert_close(found.sample_sq, expected.sample_sq, rtol=NORMS[dtype], atol=0)
            assert found.gram is not None and expected.gram is not None
            traps.assert_close(found.gram, expected.gram, NORMS[dtype], scale)
            if total is not None:
                traps.assert_close(total.double(), right, WEIGHT_GRAD[dtype])


@isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_gram", [False, True])
def test_rows_in_any_order(group_gram: bool, dtype: torch.dtype, isa: int):
    """The same bits as from rows that were put in order before, over several phases, and in views."""
    runs = runs_of([[700, 1, 2], [600], [40]])
    x, dy = batch(runs, 97, 130, dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    found, wanted = [], []
    for into, operands in ((found, (x[:, 8:72], dy, order)), (wanted, (x[order][:, 8:72], dy[order], None))):
        total = torch.empty(130, 64, dtype=dtype)
        sums = wgrad.segmented_wgrad(*operands[:2], runs, 3000, total, group_gram, operands[2], isa, 2)
        into += [sums.sample_sq, sums.group_sq, total, *([sums.gram] if sums.gram is not None else [])]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_few_groups_need_no_stored_sums(monkeypatch: pytest.MonkeyPatch):
    """Memory of a call with inner products of 8 groups: the packed operands, and not one sum for each group."""
    asked: list[int] = []
    scratch = wgrad._scratch
    monkeypatch.setattr(wgrad, "_scratch", lambda size: asked.append(size) or scratch(size))
    x, dy = batch(runs_of([[40]] * 8), 512, 512)
    wgrad.segmented_wgrad(x, dy, runs_of([[40]] * 8), 1 << 30, None, True)
    wgrad.segmented_wgrad(x, dy, runs_of([[40]] * 8), 1 << 30, None, False)
    monkeypatch.setattr(wgrad, "_MOST_PACKED", 0)
    wgrad.segmented_wgrad(x, dy, runs_of([[40]] * 8), 1 << 30, None, True)
    assert asked[0] < 2 * asked[1] and asked[2] > 8 * 512 * 512


def test_kept_memory_changes_no_result(monkeypatch: pytest.MonkeyPatch):
    """What a call before has left, NaN among it, is never read."""
    monkeypatch.setattr(wgrad, "_MOST_KEPT", 1 << 25)
    large, small = runs_of([[700], [300]]), runs_of([[32] * 5, [9], [64]])
    x, dy = batch(small, 160, 128)
    alone = [wgrad.segmented_wgrad(x, dy, small, 1 << 20, None, gram) for gram in (True, False)]
    wide = torch.full((1000, 300), torch.nan)
    for gram in (True, False):
        wgrad.segmented_wgrad(wide, wide, large, 1 << 20, torch.empty(300, 300), gram)
        again = [wgrad.segmented_wgrad(x, dy, small, 1 << 20, None, gram) for gram in (True, False)]
        for found, first in zip(again, alone, strict=True):
            assert torch.equal(found.sample_sq, first.sample_sq) and torch.equal(found.group_sq, first.group_sq)
        assert again[0].gram is not None and torch.equal(again[0].gram, alone[0].gram)


def test_calls_from_several_threads_at_once():
    runs = runs_of([[32] * 30, [900]])
    x, dy = batch(runs, 160, 128)
    alone = wgrad.segmented_wgrad(x, dy, runs, 1 << 20, None, False)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: wgrad.segmented_wgrad(x, dy, runs, 1 << 20, None, False), range(12)))
    assert all(torch.equal(sums.sample_sq, alone.sample_sq) for sums in found)


@isas
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_exactly(dtype: torch.dtype, isa: int):
    """One token times one: the weight's gradient is x itself, subnormals, infinities and NaN among it."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)[None]
    total = torch.empty(1, 1 << 16, dtype=torch.float32)
    wgrad.segmented_wgrad(x, torch.ones(1, 1, dtype=dtype), [[Span(1, True)]], 1 << 20, total, False, None, isa, 1)
    assert torch.equal(total.nan_to_num(nan=-7.0), x.float().nan_to_num(nan=-7.0))


def test_dispatch_takes_it_and_says_so():
    x = torch.randn(300, 64)
    for dtype in DTYPES:
        said = dispatch.explain(x.to(dtype), x.to(dtype), backend="auto")
        assert said.plan.backend == "cpu"
    assert dispatch.explain(x.double(), x.double()).plan.backend == "torch"


def test_what_it_cannot_take_is_refused():
    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: .*not float64.*backend='torch'"):
        gk.fused_grad_norm(x, x, backend="cpu")
    assert "on the CPU, not on 'cuda'" in str(
        backends.unavailable_reason("cpu", "fused_grad_norm", "cuda", torch.float32)
    )
    assert backends.unavailable_reason("cpu", "fused_grad_norm", "cpu", torch.float32) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_no_second_openmp_runtime_is_loaded():
    program = """
    import re, torch
    from gradnorm_kernels.backends.cpu import wgrad
    from gradnorm_kernels.backends.torch.wgrad import Span
    torch.set_num_threads(2)
    x = torch.randn(1000, 400)
    (x @ x.T).sum()
    wgrad.segmented_wgrad(x, x, [[Span(1000, True)]], 1 << 20, None, False, threads=2)
    maps = open("/proc/self/maps").read()
    print(len(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp5)[-.\\w]*", maps))), open("/proc/self/status").read())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split()[0] == "1", result.stdout
