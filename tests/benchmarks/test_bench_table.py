"""``python -m benchmarks table``: targets met or missed, wrong rows without a speed, and README's section."""

from __future__ import annotations

import re

import pytest

from benchmarks import ops, records, table, targets
from benchmarks.__main__ import main
from benchmarks.targets import Measured, judge, measured
from tests.benchmarks import bench_made_up as made_up
from tests.benchmarks.bench_made_up import not_ok, ops_record, ops_row, step_record, write

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
SQUARE = "llama-3.1-8b.q"
#: The targets as the design states them.
STATED = [1.00, 1.05, 1.10, 1.10, 16, 1.03, 1.03, 1.005, 1.005, 1.15, 1.20]


def verdict(number: int, way: str, rows: list[Measured]) -> targets.Verdict:
    return judge(targets.TARGETS[number], way, rows)


def rows_of(*rows: dict, **case) -> list[Measured]:
    return measured([ops_record(rows, **case)])


def both(layer: str, length: int, ratio: float, name: str = "auto", **case) -> list[dict]:
    """A provider's row with this ratio, and the baseline's."""
    return [
        ops_row(layer, length, "weight_grad", 1.0, 1, **case),
        ops_row(layer, length, name, ratio, 1, **case),
    ]


def test_the_targets_are_those_of_the_design():
    assert [target.limit for target in targets.TARGETS] == STATED


@pytest.mark.parametrize(
    ("number", "length", "layer"),
    [(0, 2048, SQUARE), (0, 4096, SQUARE), (1, 1024, SQUARE), (2, 256, SQUARE), (3, 256, "smollm2-135m.down")],
)
def test_a_target_is_met_or_missed_by_its_own_rows(number, length, layer):
    limit = targets.TARGETS[number].limit
    for ratio, text in ((limit, "met"), (limit + 0.05, "missed by 0.050")):
        found = verdict(number, "auto", rows_of(*both(layer, length, ratio)))
        assert found.text == text
        assert found.measured.startswith(f"{ratio:.3f} (") and f"{layer} at {length} of 16384 tokens" in found.measured
        assert found.noise == "0.997–1.003"
    others = [n for n in range(5) if n not in (number, 4)]
    assert all(verdict(n, "auto", rows_of(*both(layer, length, 1.0))).text == "not measured" for n in others)


@pytest.mark.parametrize(
    "case",
    [{"ragged": True}, {"gram": True}, {"dtype": "fp16"}, {"groups": 2}],
)
def test_a_target_does_not_apply_to_other_calls(case):
    assert verdict(0, "auto", rows_of(*both(SQUARE, 2048, 0.9, **case))).text == "not measured"


def test_kv_is_narrower_than_the_small_layers_of_the_target():
    assert verdict(3, "auto", rows_of(*both("smollm2-135m.kv", 1024, 1.0))).text == "not measured"


def test_the_worst_of_several_rows_counts():
    rows = [
        *both("smollm2-135m.q", 256, 1.2),
        *both("smollm2-135m.q", 1024, 1.01),
        *both("smollm2-135m.down", 256, 1.0),
    ]
    found = verdict(3, "auto", rows_of(*rows))
    assert found.text == "missed by 0.100" and "worst of 3: smollm2-135m.q at 256 of 16384 tokens" in found.measured


def test_a_miss_below_the_noise_is_reported_as_such():
    quiet = verdict(0, "auto", rows_of(*both(SQUARE, 2048, 1.01, noise=0.001)))
    loud = verdict(0, "auto", rows_of(*both(SQUARE, 2048, 1.01, noise=0.1)))
    assert quiet.text == "missed by 0.010"
    assert loud.text == "missed by 0.010, less than the noise"


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_wrong_or_failed_rows_have_no_verdict_and_no_speed(status, tmp_path):
    good, bad = both("smollm2-135m.q", 256, 1.0), both("smollm2-135m.q", 1024, 1.01)
    bad[1] = not_ok(bad[1], status, "norms | off by 1.0e-02 (allowed 2e-05)")
    found = verdict(3, "auto", rows_of(*good, *bad))
    assert found.text == f"no verdict: 1 of 2 {status} (norms | off by 1.0e-02)" and not found.measured
    text = table.section([write(tmp_path / "ops.json", ops_record([*good, *bad]))])
    line = next(line for line in text.splitlines() if line.startswith("| smollm2-135m.q") and "| 1024 |" in line)
    assert f"| {status} |" in line and "1.01" not in line
    assert f"- `auto` {status} in 1 rows: norms | off by 1.0e-02 (allowed 2e-05)" in text
    targets_table = [line for line in text.splitlines() if "| auto" in line and line.startswith("| ")]
    assert {line.count("|") for line in targets_table[:-1]} == {7}, "a reason's | must not make a cell"


def test_late_launches_are_reported():
    rows = both(SQUARE, 2048, 1.2)
    rows[1]["late"] = 0.05
    assert "host" not in verdict(0, "auto", rows_of(*rows)).measured
    rows[1]["late"] = 0.4
    assert verdict(0, "auto", rows_of(*rows)).measured.endswith("; the GPU waited for the host in 40% of the calls")


def test_a_provider_that_cannot_run_is_not_measured_and_says_why():
    row = not_ok(ops_row(SQUARE, 2048, "cuda_wgrad", 1.0, 1), "unable", "was built without nvcc")
    assert verdict(0, "cuda_wgrad", rows_of(row)).text == "not measured: was built without nvcc"


def test_extra_memory_has_a_limit_in_mebibytes_at_64k_tokens():
    rows = both(SQUARE, 1024, 1.0, tokens=65536)
    assert verdict(4, "auto", rows_of(*rows)).text == "met"
    rows[1]["extra_bytes"] = 41 << 20
    found = verdict(4, "auto", rows_of(*rows))
    assert found.text == "missed by 25.0 MiB" and found.measured.startswith("41.0 MiB")
    assert verdict(4, "auto", rows_of(*both(SQUARE, 1024, 1.0))).text == "not measured"


def test_steps_are_judged_at_the_sizes_of_the_target_only():
    ratios = {"nothing": 1.0, "linears": 1.05, "linears_fused": 1.02, "last_attention": 1.003}
    rows = measured([step_record(ratios)])
    found = [verdict(n, targets.TARGETS[n].ways[0], rows) for n in range(5, 9)]
    assert found[0].text == "missed by 0.020" and found[0].noise == "0.999–1.001"
    assert [v.text for v in found[1:]] == ["met", "met", "not measured"]
    for change in ({"checkpointing": True}, {"layers": 4}, {"optimizer": "sgd"}, {"model": "qwen2.5-0.5b"}):
        record = step_record(ratios)
        record["settings"] |= change
        assert verdict(6, "linears_fused", measured([record])).text == "not measured"


def test_the_published_cpu_figures_are_judged():
    rows = measured([records.read(records.RESULTS / "cpu_ratio-epyc-zen4-2-threads-compiled.json")])
    found = [verdict(n, "auto", rows) for n in (9, 10)]
    assert [v.text for v in found] == ["met", "met"]
    assert "worst of 21" in found[0].measured and "worst of 7" in found[1].measured


def test_every_published_file_gives_a_table():
    for path in sorted(records.RESULTS.glob("*.json")):
        text = table.section([path])
        assert f"- `benchmarks/results/{path.name}`: " in text and "| target |" in text


def test_of_two_measurements_of_one_case_the_later_counts():
    old = ops_record(both(SQUARE, 2048, 1.5), date="2001-01-01T00:00:00Z")
    new = ops_record(both(SQUARE, 2048, 0.9), date="2001-01-02T00:00:00Z")
    for order in ([old, new], [new, old]):
        assert verdict(0, "auto", measured(order)).text == "met"


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Files as ``ops --quick`` and ``step`` write them on a GPU where everything but two peers succeeds."""
    folder, preset = tmp_path_factory.mktemp("complete"), ops.PRESETS["quick"]
    kinds = [(n, False, False) for n in preset.lengths]
    kinds += [(n, True, False) for n in preset.ragged] + [(n, True, True) for n in preset.gram]
    rows = made_up.grid(preset.shapes, kinds, ops.DEFAULT)
    for layer, length, tokens in preset.more:
        rows += made_up.grid([layer.name], [(length, False, False)], ops.FIRST, tokens=tokens)
    for place, row in enumerate(rows):
        if row["provider"] == "vmap_grad":
            rows[place] = not_ok(row, "unable", "stores 4 gradients of 1 MiB")
        if row["provider"] == "bmm" and row["length"] == 2048:
            rows[place] = not_ok(row, "failed", "RuntimeError: | broke")
    first = write(folder / "ops-a.json", ops_record(rows) | {"left": 7})
    ratios = {"nothing": 1.0, "linears": 1.05, "linears_fused": 1.02, "last_attention": 1.003, "prompt_backwards": 3.0}
    return [first, write(folder / "step-a.json", step_record(ratios))]


def test_the_tables_name_files_columns_and_every_batch(complete, capsys):
    assert main(["table", *map(str, complete)]) == 0
    text = capsys.readouterr().out
    source = (
        "`benchmarks/results/ops-a.json`: NVIDIA Made-up 1, driver 777.0, torch 9.9, triton 8.8, commit 0123456789ab"
    )
    assert source in text
    assert "7 of its measurements were not made for lack of time" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head = next(line for line in lines if "tokens per sample" in line and "layer" in line).strip("| ").split(" | ")
    shown = ["auto", "triton_wgrad", "cuda_wgrad", "triton_norms", "cuda_norms", "two_gram", "bmm", "grouped_mm"]
    assert head == ["layer", "tokens per sample", *shown], "what is unable everywhere has no column"
    samples = [line.split(" | ")[1] for line in lines if line.startswith(f"| {SQUARE}, 4096 → 4096 |")]
    assert samples == ["256", "1024", "1024, batch of 65536", "2048", "~1000", "gram ~1000"]
    for layer, _, _ in ops.PRESETS["quick"].more:
        assert any(line.startswith(f"| {layer.name},") for line in lines), "what a target is about is in the table"
    assert not any("not measured" in line for line in lines if "| memory " in line or "| the same" in line)
    assert "| auto (triton) |" in text
    assert main(["table", str(complete[0]), "--all"]) == 0
    assert "triton_gram" in capsys.readouterr().out


def test_the_table_of_a_cpu_file_does_not_name_cublas(tmp_path):
    record = ops_record(both(SQUARE, 256, 1.0))
    del record["machine"]["gpu"]
    text = table.section([write(tmp_path / "ops.json", record)])
    assert "cuBLAS' dW" not in text and "torch's dW" in text and "made up, 2 threads" in text


def test_the_text_goes_between_the_markers(complete, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# A\n<!-- performance: begin, by a command -->\nold | 1.00\n<!-- performance: end -->\nlast\n")
    assert main(["table", *map(str, complete), "--into", str(page)]) == 0
    assert "made from ops-a.json, step-a.json" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("# A\n<!-- performance: begin, by a command -->\n\n- `bench")
    assert text.endswith("\n\n<!-- performance: end -->\nlast\n")
    assert "old" not in text and table.between(page) == table.section(complete)
    assert main(["table", *map(str, complete), "--into", str(page)]) == 0
    assert page.read_text() == text, "twice is the same as once"


@pytest.mark.parametrize("text", ["# A\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n", f"{BEGIN}\n"])
def test_a_page_without_the_markers_is_left_alone(complete, tmp_path, text, capsys):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["table", str(complete[0]), "--into", str(page)])
    assert ended.value.code == 2 and "performance: begin" in capsys.readouterr().err
    assert page.read_text() == text


def test_readme_is_made_only_from_files_in_the_results_folder(complete, capsys):
    before = table.README.read_text()
    with pytest.raises(SystemExit) as ended:
        main(["table", str(complete[0]), "--into", str(table.README)])
    assert ended.value.code == 2 and "ops-a.json must lie in" in capsys.readouterr().err
    assert table.README.read_text() == before


def test_files_of_two_gpus_or_of_the_interpreter_are_refused(tmp_path):
    first = write(tmp_path / "a.json", ops_record(both(SQUARE, 256, 1.0)))
    second = write(tmp_path / "b.json", ops_record(both(SQUARE, 256, 1.0), gpu="NVIDIA Made-up 2"))
    with pytest.raises(ValueError, match="must be of one GPU, not of NVIDIA Made-up 1 and NVIDIA Made-up 2"):
        table.section([first, second])
    record = ops_record(both(SQUARE, 256, 1.0))
    record["machine"]["triton_interpreter"] = True
    with pytest.raises(ValueError, match="interpreter"):
        table.section([write(tmp_path / "c.json", record)])


def expected_of_readme(folder, text: str) -> str:
    """README's section, made from the files that it names; the newest GPU results of each kind must be among them."""
    newest: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*.json")):
        record = records.read(path)
        if "gpu" in record["machine"] and record["benchmark"] in ("ops", "step"):
            kind, found = record["benchmark"], (record["machine"]["date"], path.name)
            newest[kind] = max(newest.get(kind, found), found)
    named = re.findall(r"^- `benchmarks/results/(\S+\.json)`", text, re.MULTILINE)
    assert set(named) >= {name for _, name in newest.values()}, "README was not made from the newest results of a GPU"
    assert newest or not named, "README names results of a GPU that are not there"
    return table.section([folder / name for name in named])


def test_readme_is_made_from_the_newest_results_of_a_gpu():
    text = table.between(table.README)
    assert text == expected_of_readme(records.RESULTS, text)
    assert ("not measured on a GPU" in text) == ("|" not in text)


def test_the_readme_test_detects_an_old_table_and_a_changed_number(tmp_path):
    for number, date in enumerate(("2001-01-01T00:00:00Z", "2001-01-02T00:00:00Z")):
        write(tmp_path / f"ops-{number}.json", ops_record(both(SQUARE, 2048, 1.0 + number), date=date))
    old, new = (table.section([tmp_path / f"ops-{number}.json"]) for number in (0, 1))
    assert new == expected_of_readme(tmp_path, new)
    changed = new.replace("missed by 1.00", "missed by 0.00")
    assert changed != new and expected_of_readme(tmp_path, changed) == new
    for text in (old, table.NOTHING):
        with pytest.raises(AssertionError, match="newest"):
            expected_of_readme(tmp_path, text)


def test_the_measured_steps_in_readme_are_those_of_the_result_file():
    record = records.read(records.RESULTS / "step-epyc-2-threads.json")
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$", table.README.read_text(), re.MULTILINE
    )
    ratios = {row["variant"]: [f"{row['ratio'][key]:.2f}" for key in ("median", "q1", "q3")] for row in record["rows"]}
    assert {name: found for name, *found in rows} == ratios and len(rows) == len(ratios)


def test_the_measured_steps_in_the_docs_are_those_of_the_result_file():
    text = (table.README.parent / "docs" / "benchmarks.md").read_text()
    record = records.read(records.RESULTS / "step-epyc-2-threads-sketch.json")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| (-?[\d.]+) GiB \|$", text, re.MULTILINE)
    expected = []
    for row in record["rows"]:
        more = (row["peak_bytes"] - row["baseline_peak_bytes"]) / 2**30
        ratio = [f"{row['ratio'][name]:.2f}" for name in ("median", "q1", "q3")]
        expected.append((row["variant"], *ratio, f"{more:.2f}"))
    assert rows == expected


def test_the_table_of_a_cpu_is_that_of_the_result_file():
    """Each shape's last measurement, and README's ranges; a shape that was measured twice is named in both texts."""
    record = records.read(records.RESULTS / "cpu_ratio-epyc-zen4-2-threads-compiled.json")
    last: dict[tuple[int, int, bool], float] = {}
    for row in record["rows"]:
        last[row["d"], row["length"], row["ragged"]] = row["ratio"]
    even = [ratio for (_, _, ragged), ratio in last.items() if not ragged]
    mixed = [ratio for (_, _, ragged), ratio in last.items() if ragged]
    text = (table.README.parent / "docs" / "benchmarks.md").read_text()
    printed = re.findall(
        r"^\| (\d+) ((?:\| [\d.]+ ){7})\|$", text[text.index("## Measured on a CPU\n") :], re.MULTILINE
    )
    lengths = (32, 64, 128, 256, 512, 1024, 2048)
    found = {(int(d), n, False): v for d, row in printed for n, v in zip(lengths, row.split("|")[1:], strict=True)}
    assert {shape: v.strip() for shape, v in found.items()} == {k: f"{v:.2f}" for k, v in last.items() if not k[2]}
    readme = " ".join(table.README.read_text().split())
    assert f"take between {min(even):.2f} and {max(even):.2f} times" in readme
    assert f"its first run took {max(row['ratio'] for row in record['rows'] if not row['ragged']):.2f} times" in readme
    assert f"it is up to {max(mixed):.2f} times" in readme
