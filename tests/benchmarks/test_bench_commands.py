"""``python -m benchmarks``: tiny runs on a CPU, their result files and pictures, and the errors."""

from __future__ import annotations

import argparse
import copy
import json

import pytest
import torch

from benchmarks import experts_cost, ops, records, step, verification_cost
from benchmarks.__main__ import main
from benchmarks.batches import LAYERS
from benchmarks.harness import LostError
from benchmarks.providers import BASELINE, PROVIDERS
from benchmarks.records import machine, nvidia_smi
from benchmarks.step_variants import build, linears


@pytest.fixture(scope="module")
def ops_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ops") / "ops.json"
    arguments = ["ops", "--dry-run", "--shapes", "tiny.kv", "--lengths", "1", "33", "--dtypes", "fp32"]
    providers = [BASELINE, "torch", "torch_norms", "cuda", "two_gram", "bmm", "grouped_mm"]
    assert main([*arguments, "--providers", *providers, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def step_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("step") / "step.json"
    sizes = ["--pairs", "2", "--length", "8", "--prompts", "3", "--layers", "1"]
    assert main(["step", "--dry-run", *sizes, "--out", str(path)]) == 0
    return path


def test_ops_measures_providers_that_can_run_and_records_why_others_cannot(ops_file):
    record = records.read(ops_file)
    assert record["left"] == 0
    assert record["ceilings"]["fp32"]["product_tflops"] > 0
    assert {"torch", "python", "commit", "date", "triton", "cpu"} <= set(record["machine"])
    status = {(row["provider"], row["status"]) for row in record["rows"]}
    assert status >= {(BASELINE, "ok"), ("torch", "ok"), ("torch_norms", "ok"), ("bmm", "ok"), ("two_gram", "ok")}
    for row in record["rows"]:
        if row["provider"] in ("cuda", "grouped_mm"):
            assert row["status"] == "unable" and len(row["reason"]) > 10
        if row["provider"] == "torch":
            assert row["ran"]["backend"] == "torch"
        if row["status"] == "ok":
            assert row["late"] == 0 and row["host_seconds"] > 0 and row["token_pairs"] >= row["tokens"]
    kinds = {(row["length"], row["ragged"], row["gram"]) for row in record["rows"]}
    assert kinds == {(1, False, False), (33, False, False), (13, True, False), (13, True, True)}
    grams = [row for row in record["rows"] if row["gram"] and row["provider"] == "torch"]
    assert grams and all("group gram" in row["errors"] for row in grams)


def test_step_compares_norms_before_it_times(step_file):
    record = records.read(step_file)
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows) == list(step.VARIANTS)
    assert all(row["status"] == "ok" for row in rows.values())
    for name in ("last_attention", "last_attention_fused", "linears", "linears_fused", "everything_fused_tasks"):
        errors = rows[name]["errors"]
        assert set(errors) == {
            "norms against prompt_microbatches",
            "norms against prompt_backwards",
            "gradient",
        }
        assert max(errors.values()) < 1e-4
    assert record["facts"]["tokens"] == 3 * 2 * 8


def test_step_refuses_wrong_norms(monkeypatch):
    from benchmarks.step import StepJobs

    sizes = {"prompts": 2, "completions": 1, "length": 5, "tasks": 1, "pairs": 2}
    settings = {"model": "tiny", "layers": 1, "dtype": "fp32", "checkpointing": False, "optimizer": "sgd"} | sizes
    jobs = StepJobs("cpu", settings)
    right = StepJobs._tracker_norms
    monkeypatch.setattr(StepJobs, "_tracker_norms", lambda self, variant: right(self, variant) * 1.01)
    row = jobs({"variant": "last_attention"})
    assert row["status"] == "wrong" and "norms against prompt_microbatches off by 1.0e-02" in row["reason"]
    assert "seconds" not in row and "ratio" not in row


def test_plots_are_drawn_from_result_files(ops_file, step_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(ops_file), str(step_file), "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "ops-tiny-fp32-uniform.png",
        "ops-tiny-fp32-ragged.png",
        "ops-tiny-fp32-gram.png",
        "ops-tiny-fp32-uniform-ours.png",
        "ops-tiny-fp32-ragged-ours.png",
        "ops-tiny-fp32-gram-ours.png",
        "ops-roofline-fp32.png",
        "step.png",
    }
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    assert main(["plot", str(step_file), "--providers", "torch", "--out", str(tmp_path)]) == 1
    assert "no measured row to draw" in capsys.readouterr().out


def test_the_published_files_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    files = sorted(records.RESULTS.glob("*.json"))
    assert files
    assert main(["plot", *map(str, files), "--out", str(tmp_path), "--format", "svg"]) == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("machine"), "has no machine"),
        (lambda r: r.update(benchmark="other"), "'benchmark' must be one of ops, step, cpu_ratio"),
        (lambda r: r["rows"][0].pop("ratio"), r"row 0 \(ok\) lacks ratio"),
        (lambda r: r["rows"][0].update(status="good"), "row 0 has status 'good'"),
        (lambda r: r["rows"][0].update(status="wrong"), "gives a speed for a wrong result"),
    ],
)
def test_a_damaged_record_is_neither_written_nor_read(ops_file, tmp_path, damage, message):
    record = json.loads(ops_file.read_text())
    damage(record)
    with pytest.raises(ValueError, match=message):
        records.write(tmp_path / "new.json", record)
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        records.read(tmp_path / "old.json")


def test_results_are_named_by_device_and_commit(ops_file):
    where = copy.deepcopy(records.read(ops_file)["machine"])
    where |= {"commit": "0123456789ab", "date": "2026-01-02T03:04:05Z", "gpu": {"name": "Some GPU 80GB"}}
    assert records.default_path("ops", where).name == "ops-some-gpu-80gb-0123456789ab-202601020304.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--shapes", "gpt"], "'gpt' is no layer"),
        (["ops", "--dry-run", "--lengths", "0"], "must be at least 1, got 0"),
        (["ops", "--providers", "magic"], "invalid choice: 'magic'"),
        (["step", "--prompts", "1", "--device", "cpu"], "--prompts must be at least 2, got 1"),
        (["step", "--completions", "0", "--device", "cpu"], "--completions, --tasks and --layers must be at least 1"),
        (["plot", "no-such-file.json"], "no-such-file.json"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "required: command"),
    ],
)
def test_invalid_arguments_end_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("command", ["ops", "step"])
def test_a_missing_gpu_is_an_error(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--device", "cuda"])
    assert ended.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


class StandIn:
    """Stands in for the child process: answers by provider."""

    def __init__(self, factory, arguments, patience) -> None:
        pass

    def __call__(self, job):
        if "ceilings" in job:
            raise RuntimeError("none")
        name = job["provider"]
        if name == "cuda":
            raise LostError("no answer for 9 s")
        if name == "bmm":
            raise RuntimeError("bmm broke")
        provider = PROVIDERS[name]
        found = {"provider": name, "does": provider.does, "ours": provider.ours, "samples": 1}
        if name == "triton":
            return found | {"status": "wrong", "reason": "norms off by 1"}
        return found | {"status": "unable", "reason": "not here"}

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


@pytest.mark.parametrize(
    ("providers", "status"),
    [(["torch", "cuda"], 1), (["torch", "triton"], 1), (["torch"], 1), (["torch", "bmm"], 1)],
)
def test_a_failing_provider_is_recorded_and_the_others_go_on(providers, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "Worker", StandIn)
    out = tmp_path / "ops.json"
    arguments = ["ops", "--dry-run", "--shapes", "tiny.q", "--lengths", "4", "--ragged", "--gram", "--dtypes", "fp32"]
    assert main([*arguments, "--providers", *providers[::-1], "--out", str(out)]) == status
    rows = records.read(out)["rows"]
    assert [row["provider"] for row in rows] == providers[::-1]
    assert not any("seconds" in row for row in rows)
    printed = capsys.readouterr().out
    assert "torch: unable on 1 of the batches: not here" in printed
    assert ("cuda: failed on 1 of the batches: no answer for 9 s" in printed) == ("cuda" in providers)


def test_a_failing_peer_does_not_change_the_status():
    row = {"provider": "bmm", "ours": False, "status": "failed", "reason": "broke"}
    fine = {"provider": BASELINE, "ours": False, "status": "ok"}
    ours = {"provider": "triton", "ours": True, "status": "failed", "reason": "broke"}
    assert ops._conclude([fine, row], 0, records.RESULTS) == 0
    assert ops._conclude([fine, row, ours], 0, records.RESULTS) == 1


def test_presets():
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    quick = list(ops.cases_of(parser.parse_args([]), "cuda"))
    full = list(ops.cases_of(parser.parse_args(["--full"]), "cuda"))
    assert len(quick) < len(full)
    assert {case.dtype for _, case in full} == {"bf16"}
    assert {case.length for _, case in full if not case.ragged} == {64, 128, 256, 512, 1024, 2048, 4096, 8192}
    assert {layer.model for layer, _ in full} == {"smollm2-135m", "qwen2.5-3b", "llama-3.1-8b"}
    # The batches of the targets come first, and the providers of the targets before the others.
    batches = [(case.d_in, case.d_out, case.length, case.tokens) for _, case in quick]
    assert (4096, 4096, 1024, 65536) in batches[:5]
    for length in (256, 1024, 2048):
        for d_in, d_out in ((4096, 4096), (576, 576), (576, 1536), (1536, 1536)):
            assert (d_in, d_out, length, 16384) in batches
    first, then = ops.providers_of(parser.parse_args([]), "cuda")
    assert set(first) == {BASELINE, "auto", "triton_wgrad", "cuda_wgrad"} and set(first) | set(then) == set(ops.DEFAULT)
    assert ops.providers_of(parser.parse_args(["--providers", "bmm"]), "cuda") == [("bmm",)]
    (costs,) = ops.providers_of(parser.parse_args(["--costs"]), "cuda")
    assert costs[0] == BASELINE and {"triton_gram_norms", "cuda_wgrad"} <= set(costs) <= set(PROVIDERS)
    one = list(ops.cases_of(parser.parse_args(["--lengths", "5", "--ragged", "--gram"]), "cpu"))
    assert {(case.length, case.dtype) for _, case in one} == {(5, "fp32")}


def test_the_machine_without_a_gpu(monkeypatch):
    assert "gpu" not in machine("cpu")
    assert machine("cpu", "0123456789ab")["commit"] == "0123456789ab"
    monkeypatch.setattr("benchmarks.records.shutil.which", lambda name: None)
    assert nvidia_smi("a GPU") == "nvidia-smi was not found"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-0.5b", 494_032_768),
        ("llama-3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_models_have_the_published_number_of_parameters(name, parameters):
    pytest.importorskip("transformers")
    model, _ = build(name, None, torch.bfloat16, torch.device("meta"), checkpointing=True)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    shapes = {tuple(model.get_submodule(layer).weight.shape) for layer in linears(model)}
    named = {(layer.d_out, layer.d_in) for layer in LAYERS.values() if layer.model == name}
    assert not named or named == shapes


@pytest.mark.parametrize("command", [experts_cost, verification_cost])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--quick", 2)])
def test_a_command_without_options_does_not_ignore_one(command, argument, status, capsys):
    """It would measure for a minute instead of saying what it does."""
    with pytest.raises(SystemExit) as ended:
        command.main([argument])
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert ("unrecognized arguments: --quick" in printed.err) if status else ("Run it alone" in printed.out)
