"""``python -m benchmarks freeze``: planted costs are recovered, dispatch follows them, bad rows freeze nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import freeze
from benchmarks.__main__ import main
from benchmarks.providers import TILES
from gradnorm_kernels import backends, dispatch
from gradnorm_kernels.dispatch import Problem, choose
from gradnorm_kernels.tuning import costs as tuning
from gradnorm_kernels.tuning import tiles
from gradnorm_kernels.tuning.costs import Chip, Costs
from gradnorm_kernels.tuning.tiles import KernelConfig
from tests.benchmarks import bench_made_up as made_up
from tests.benchmarks.bench_made_up import PLANTED, not_ok, ops_record, write
from tests.tuning import test_tuning

CHIP = Chip("cuda", "nvidia-made-up-1", 90)
LAYERS = ("smollm2-135m.q", "qwen2.5-3b.q", "llama-3.1-8b.q")
UNIFORM = [(n, False, False) for n in (64, 128, 256, 512, 1024, 2048)]
RAGGED = [(n, True, False) for n in (100, 400, 1000)]
GRAM = [(400, True, True)]


def rows(backend: str = "triton", layers=LAYERS, kinds=(*UNIFORM, *RAGGED), planted: Costs = PLANTED, **case) -> list:
    case = {"tokens": 8192, "planted": planted, "scatter": 0.01} | case
    passes = made_up.grid(layers, kinds, [f"{backend}_wgrad", f"{backend}_gram"], **case)
    return passes + made_up.grid(layers, GRAM, [f"{backend}_gram_norms"], **case)


def frozen(folder: Path, made: list, *arguments: str, **where) -> dict:
    """The file that ``freeze`` writes for the rows."""
    source = write(folder / "ops-made-up.json", ops_record(made, **where))
    assert main(["freeze", str(source), "--out", str(folder / "configs.json"), *arguments]) == 0
    return json.loads((folder / "configs.json").read_text())


def refused(folder: Path, capsys: pytest.CaptureFixture[str], made: list, *arguments: str, **where) -> str:
    """The message of ``freeze``, which writes no file."""
    source = write(folder / "ops-made-up.json", ops_record(made, **where))
    with pytest.raises(SystemExit) as ended:
        main(["freeze", str(source), "--out", str(folder / "configs.json"), *arguments])
    assert ended.value.code == 2 and not (folder / "configs.json").exists()
    return capsys.readouterr().err


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """``shipped(content)``: adds this file for the made-up GPU to the library's configs."""
    real = tuning.frozen

    def put(content: dict) -> None:
        monkeypatch.setattr(tuning, "frozen", lambda name: content if name == CHIP.gpu else real(name))
        forget()

    def forget() -> None:
        for cached in (tuning.entries, tuning.costs, tuning.faster, tiles._kernel_config, dispatch.choose):
            cached.cache_clear()

    yield put
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("seed", range(3))
def test_planted_constants_are_found_again(tmp_path, seed):
    planted = [
        PLANTED,
        Costs(0, 0, 90.0, 0.5, 400.0, 1.1, 1, 1),
        Costs(0, 0, 8.0, 2.0, 20.0, 0.4, 1, 1),
    ][seed]
    block = frozen(tmp_path, rows(planted=planted))["costs"]["triton"]
    assert [(e["d_in"], e["d_out"], e["element_bytes"]) for e in block["entries"]] == [
        (576, 576, 2),
        (2048, 2048, 2),
        (4096, 4096, 2),
    ]
    for entry in block["entries"]:
        assert entry["epilogue"] == pytest.approx(planted.epilogue, rel=0.25)
        assert entry["gram"] == pytest.approx(planted.gram, rel=0.15)
        assert entry["gram_token"] == pytest.approx(planted.gram_token, rel=0.25, abs=20)
        assert entry["pairs"] == pytest.approx(planted.pairs, rel=0.05)
    assert "NVIDIA Made-up 1, driver 777.0, torch 9.9, triton 8.8, commit 0123456789ab" in block["measured_on"]
    assert "ops-made-up.json" in block["measured_on"] and "workspace and gram_tile as before" in block["measured_on"]


def test_without_noise_they_are_found_exactly(tmp_path):
    for entry in frozen(tmp_path, rows(scatter=0.0))["costs"]["triton"]["entries"]:
        for name in ("epilogue", "gram", "gram_token", "pairs"):
            assert entry[name] == pytest.approx(getattr(PLANTED, name), rel=0.006), name


def test_batches_of_another_size_do_not_mix_in(tmp_path):
    # The fixed cost per call is a larger share of small batches.
    more = rows(kinds=[(256, False, False), (1024, False, False)], tokens=2048, base=2.0, scatter=0.0)
    for entry in frozen(tmp_path, [*more, *rows(scatter=0.0)])["costs"]["triton"]["entries"]:
        assert entry["epilogue"] == pytest.approx(PLANTED.epilogue, rel=0.006)
        assert entry["gram_token"] == pytest.approx(PLANTED.gram_token, rel=0.006)


def test_dispatch_follows_the_frozen_crossover(tmp_path, shipped, monkeypatch):
    monkeypatch.setattr(
        backends, "unavailable_reason", lambda name, *_: None if name in ("torch", "triton") else "not here"
    )
    planted = dataclasses.replace(PLANTED, epilogue=90.0)
    shipped(frozen(tmp_path, rows(planted=planted)))
    decided = 0
    for d in (576, 2048, 4096):

        def plan(length: int, tokens: int = 8192, weight_grad: bool = True, groups: int = 1, d: int = d):
            shape = (CHIP, tokens, d, d, tokens // length, groups)
            return choose(Problem(*shape, weight_grad, groups > 1, torch.bfloat16)).plan

        weight, width = d * d, 2 * d

        def gram_is_cheaper(length: int, weight: int = weight, width: int = width) -> bool:
            return (planted.gram * length + planted.gram_token) * length * width < planted.epilogue * weight

        for length in (16, 32, 64, 128, 256, 512, 1024, 2048):
            prices = (planted.gram * length + planted.gram_token) * length * width, planted.epilogue * weight
            if max(prices) < 1.1 * min(prices):
                continue  # too close: either choice is right
            assert (plan(length).gram_tokens >= length) == gram_is_cheaper(length), (d, length)
        # All pairs of tokens against workspaces of every sample's gradient, with the samples' Gram.
        for tokens in (256, 512, 1024, 2048, 4096, 16384):
            samples = tokens // 64
            dear = planted.epilogue * weight
            cheap = min(dear, (planted.gram * 64 + planted.gram_token) * 64 * width)
            workspaces = [(tokens + samples * samples) * weight + samples * norm for norm in (cheap, dear)]
            by_pairs = planted.pairs * tokens * tokens * width
            if not 0.85 * workspaces[0] < by_pairs < 1.2 * workspaces[1]:
                decided += 1
                found = plan(64, tokens, weight_grad=False, groups=samples).group_sums
                assert (found == "gram") == (by_pairs < workspaces[0]), (d, tokens)
    assert decided > 10


def test_the_file_passes_the_checks_of_shipped_files(tmp_path, monkeypatch):
    folder = tmp_path / "tuned" / CHIP.gpu
    monkeypatch.setattr(tiles, "tuned_folder", lambda: tmp_path / "tuned")
    monkeypatch.setattr(tiles, "_stamp", lambda: {"format": 1, "triton": "8.8"})
    config = KernelConfig("wgrad", 90, 2, 128, 128, 64, 8, 4, descriptors=True)
    tiles.save_tuned(CHIP.gpu, 2048, 2048, config)
    tiles.save_tuned(CHIP.gpu, 4096, 4096, dataclasses.replace(config, kernel="gram"))
    made = rows() + rows("cuda", base=1.2)
    content = frozen(tmp_path, made, "--tuned", str(folder.parent))
    assert list(content) == ["costs", "kernels", "faster"]
    assert [entry["kernel"] for entry in content["kernels"]["entries"]] == ["gram", "wgrad"]
    assert content["kernels"]["measured_on"].endswith(
        "commit 0123456789ab: python -m gradnorm_kernels tune, the fastest that was right"
    )
    assert {entry["backend"] for entry in content["faster"]["entries"]} == {"triton"}
    configs = tmp_path / "package" / "configs"
    configs.mkdir(parents=True)
    for name in ("default", "cpu", "sm80", "sm90"):
        (configs / f"{name}.json").write_text((freeze.CONFIGS / f"{name}.json").read_text())
    (configs / f"{CHIP.gpu}.json").write_text((tmp_path / "configs.json").read_text())
    monkeypatch.setattr(test_tuning, "resources", SimpleNamespace(files=lambda package: configs.parent))
    test_tuning.test_frozen_files_are_whole()
    content["costs"]["triton"]["entries"][0]["epilogue"] = -1
    (configs / f"{CHIP.gpu}.json").write_text(json.dumps(content))
    with pytest.raises(AssertionError):
        test_tuning.test_frozen_files_are_whole()


def test_shipped_files_have_the_format_of_freeze():
    for path in freeze.CONFIGS.glob("*.json"):
        assert freeze.text_of(json.loads(path.read_text())) == path.read_text(), path.name


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_wrong_row_freezes_nothing_of_its_backend(tmp_path, capsys, status):
    made = [*rows("cuda"), *rows()]
    made[3] = not_ok(made[3], status, "norms off by 1")
    said = refused(tmp_path, capsys, made)
    assert f"was {status} for" in said and "(norms off by 1)" in said and "cuda_" in said
    content = frozen(tmp_path, made, "--backends", "triton")
    assert set(content["costs"]) == {"triton"}


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        (
            lambda row: row["provider"] != "triton_gram_norms",
            "triton_gram_norms must be measured at a batch of the kind",
        ),
        (
            lambda row: row["provider"] != "triton_gram" or row["length"] > 1000,
            "triton_gram must be measured at 3 lengths",
        ),
        (
            lambda row: row["provider"] != "triton_wgrad" or row["length"] < 128,
            "triton_wgrad must be measured at 3 lengths",
        ),
    ],
)
def test_too_few_rows_are_named(tmp_path, capsys, kept, missing):
    said = refused(tmp_path, capsys, [row for row in rows(layers=["llama-3.1-8b.q"]) if kept(row)])
    assert missing in said and "4096 x 4096" in said


def test_a_backend_without_enough_rows_does_not_block_the_other(tmp_path, capsys):
    made = rows() + [row for row in rows("cuda") if row["provider"] != "cuda_gram_norms"]
    assert set(frozen(tmp_path, made)["costs"]) == {"triton"}
    assert "left out: nothing of cuda can be frozen: cuda_gram_norms must be measured" in capsys.readouterr().out
    (tmp_path / "configs.json").unlink()
    assert "nothing of cuda can be frozen" in refused(tmp_path, capsys, made, "--backends", "triton", "cuda")


def test_a_shape_without_all_rows_is_left_out_and_named(tmp_path, capsys):
    made = [row for row in rows() if row["d_in"] != 576 or row["provider"] != "triton_gram"]
    assert [entry["d_in"] for entry in frozen(tmp_path, made)["costs"]["triton"]["entries"]] == [2048, 4096]
    assert "left out: triton_gram must be measured at 3 lengths for 576 x 576, there is none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [("epilogue", -20.0), ("gram", -0.2), ("gram_token", -300.0)],
)
def test_negative_constants_are_refused_with_what_to_measure(tmp_path, capsys, name, value):
    planted = dataclasses.replace(PLANTED, **{name: value})
    said = refused(tmp_path, capsys, rows(layers=["llama-3.1-8b.q"], planted=planted, scatter=0.0))
    assert f"{name} of triton at 4096 x 4096 must be positive, the rows give {value:.3g}" in said
    assert "add rows of triton_" in said


def test_a_gram_token_within_its_error_of_zero_is_zero(tmp_path):
    planted = dataclasses.replace(PLANTED, gram_token=-1.0)
    entry = frozen(tmp_path, rows(layers=["llama-3.1-8b.q"], planted=planted))["costs"]["triton"]["entries"][0]
    assert entry["gram_token"] == 0 and entry["gram"] == pytest.approx(PLANTED.gram, rel=0.1)


def test_a_constant_smaller_than_its_error_is_named(tmp_path):
    made = rows(layers=["llama-3.1-8b.q"], scatter=0.0)
    assert "standard error" not in frozen(tmp_path, made)["costs"]["triton"]["measured_on"]
    for row in made:
        middle = row["ratio"]["median"]
        row["ratio"] |= {"q1": middle - 3, "q3": middle + 3}
    said = frozen(tmp_path, made)["costs"]["triton"]["measured_on"]
    hidden = ", ".join(f"{name} at 4096 x 4096" for name in ("epilogue", "gram", "gram_token"))
    assert said.endswith(f"less than its own standard error: {hidden}")


def test_rows_that_do_not_fit_the_model_are_refused(tmp_path, capsys):
    # At one length Grams are dearer, although the fit to the other lengths makes them cheaper.
    made = rows(layers=["llama-3.1-8b.q"], scatter=0.0, planted=dataclasses.replace(PLANTED, epilogue=150.0))
    for row in made:
        if row["provider"] == "triton_gram" and row["length"] == 256:
            row["ratio"] = {key: 2 * value for key, value in row["ratio"].items()}
    said = refused(tmp_path, capsys, made)
    assert "triton at 4096 x 4096 do not fit: choosing by them loses 49" in said and "% at a length" in said


def test_faster_has_an_entry_only_beyond_the_spread(tmp_path, capsys):
    def named(base: float, **case) -> list[str]:
        content = frozen(
            tmp_path, rows(scatter=0.0) + rows("cuda", base=base, scatter=0.0, **case), "--backends", "triton"
        )
        (tmp_path / "configs.json").unlink()
        return [entry["backend"] for entry in content.get("faster", {"entries": []})["entries"]]

    assert named(0.9) == ["cuda"] * 3 and named(1.2) == ["triton"] * 3
    assert named(made_up.BASE + 0.0005) == []
    assert "within the spread" in capsys.readouterr().out
    assert named(0.9, noise=0.5) == []


def test_candidate_tiles_do_not_make_a_backend_faster(tmp_path):
    tried = [row | {"provider": TILES[0]} for row in rows("cuda", base=0.5, scatter=0.0)]
    made = rows(scatter=0.0) + rows("cuda", base=1.2, scatter=0.0) + tried
    content = frozen(tmp_path, made, "--backends", "triton")
    assert [entry["backend"] for entry in content["faster"]["entries"]] == ["triton"] * 3


def test_faster_skips_a_shape_with_wrong_rows(tmp_path, capsys, shipped, monkeypatch):
    made = rows() + rows("cuda", base=0.8)
    place = next(n for n, row in enumerate(made) if row["provider"] == "cuda_gram" and row["d_in"] == 576)
    made[place] = not_ok(made[place], "failed", "no answer for 60 s")
    content = frozen(tmp_path, made, "--backends", "triton")
    assert [entry["d_in"] for entry in content["faster"]["entries"]] == [2048, 4096]
    assert "no entry for 576 x 576" in capsys.readouterr().out
    shipped(content)
    monkeypatch.setattr(
        backends, "unavailable_reason", lambda name, *_: None if name in ("triton", "cuda") else "not here"
    )
    choice = choose(Problem(CHIP, 8192, 4096, 4096, 8, 1, True, False, torch.bfloat16))
    assert choice.plan.backend == "cuda" and "was measured fastest" in choice.why


def test_other_blocks_are_unchanged(tmp_path, capsys):
    first = frozen(tmp_path, rows() + rows("cuda", base=1.3))
    second = frozen(tmp_path, rows(planted=dataclasses.replace(PLANTED, epilogue=200.0)))
    assert second["costs"]["cuda"] == first["costs"]["cuda"] and second["faster"] == first["faster"]
    assert second["costs"]["triton"] != first["costs"]["triton"]
    assert "kept as they were: faster, costs of cuda" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"triton": "8.7"}, "was tuned with triton 8.7, the results are of 8.8"),
        ({"entry": {"kernel": "wgrad"}}, "its entry must have arch, block_k"),
        ({"arch": 80}, "is for sm_80, the GPU of the results takes sm_90"),
        ({"folder": "another-gpu"}, "must lie in a folder named nvidia-made-up-1"),
    ],
)
def test_tuned_files_of_another_gpu_or_triton_are_refused(tmp_path, capsys, change, said):
    config = KernelConfig("wgrad", change.get("arch", 90), 2, 128, 128, 64, 8, 4)
    content = {"format": 1, "triton": "8.8", "entry": {"d_in": 9, "d_out": 9, **dataclasses.asdict(config)}}
    content |= {key: value for key, value in change.items() if key in content}
    folder = tmp_path / "tuned" / change.get("folder", CHIP.gpu)
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(json.dumps(content))
    assert said in refused(tmp_path, capsys, rows(), "--tuned", str(tmp_path / "tuned"))


def test_the_default_output_is_the_file_of_the_gpu_and_a_cpu_has_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(freeze, "CONFIGS", tmp_path)
    source = write(tmp_path / "ops.json", ops_record(rows(layers=["llama-3.1-8b.q"])))
    assert main(["freeze", str(source)]) == 0
    assert (tmp_path / "nvidia-made-up-1.json").is_file()
    record = ops_record(rows(layers=["llama-3.1-8b.q"]))
    del record["machine"]["gpu"]
    write(source, record)
    with pytest.raises(SystemExit):
        main(["freeze", str(source)])
    assert "--out must name the file" in capsys.readouterr().err


def test_files_of_other_versions_or_with_nothing_to_freeze_are_refused(tmp_path, capsys):
    first = write(tmp_path / "a.json", ops_record(rows(layers=["llama-3.1-8b.q"])))
    record = ops_record(rows(layers=["llama-3.1-8b.q"]))
    record["machine"]["triton"] = "8.7"
    second = write(tmp_path / "b.json", record)
    with pytest.raises(SystemExit):
        main(["freeze", str(first), str(second), "--out", str(tmp_path / "c.json")])
    assert "must be of one device, torch and triton" in capsys.readouterr().err
    said = refused(tmp_path, capsys, made_up.grid(LAYERS, UNIFORM, ["weight_grad", "bmm"]))
    assert "hold nothing to freeze" in said
