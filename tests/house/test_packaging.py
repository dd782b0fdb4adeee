"""The repository as a whole: what is shipped, what must not be committed, and documentation that is still true."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import gradnorm_kernels as gk

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CODE = ("gradnorm_kernels", "python", "tests", "tools", "benchmarks")
#: How the names of C++ and CUDA sources end, under csrc/ and tests/.
COMPILED = (".cu", ".cuh", ".cpp", ".h", ".in")
SKIPPED = {".git", ".venv", "runs", "build", "dist", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def code_files() -> list[Path]:
    return sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))


def compiled_files() -> list[Path]:
    files = (path for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in files if path.suffix in COMPILED)


def text_files() -> list[Path]:
    """Every file that is or may be committed and is text."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.endswith(".egg-info")]
        for name in names:
            path = Path(folder) / name
            if name == ".git":  # in a worktree of git's a file, which names a folder of the machine
                continue
            if b"\0" not in path.read_bytes()[:8192] and name != "LICENSE":
                found.append(path)
    return sorted(found)


def lines_matching(pattern: str, files: list[Path], allowed: tuple[str, ...] = ()) -> list[str]:
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            for match in re.finditer(pattern, line):
                if match.group().lower() not in allowed:
                    found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    return found


def test_files_are_short():
    files = [*code_files(), *compiled_files(), ROOT / "CMakeLists.txt", ROOT / "Makefile"]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {"gradnorm_kernels/ops.py", "csrc/bindings.cpp"} <= long.keys()
    assert not {name: lines for name, lines in long.items() if lines > 600}
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80


def test_every_file_opens_with_what_it_holds():
    missing = [p for p in code_files() if not re.match(r'(#![^\n]*\n)?r?"""\S', p.read_text())]
    missing += [p for p in compiled_files() if not re.match(r"(#pragma once\n+)?(// \S|/\* ?\S)", p.read_text())]
    assert not missing


OURS_AT_MOST = 3
#: How the names of other programs' variables begin, which we may read or set.
FOREIGN = ("CI", "CUDA_", "HF_", "HOME", "LOCAL_RANK", "MASTER_", "MKL_", "MPL", "NO_COLOR", "OMP_", "PATH", "PYTEST_")
FOREIGN += ("PYTHON", "RANK", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "TRL_", "WORLD_SIZE", "XDG_")
#: Of compilers: CXX and its like.
FOREIGN += ("CC", "CXX")


def own_variables(source: str) -> set[str]:
    read = r"""(?:environ(?:\.get|\.setdefault|\.pop)?|getenv|setenv)\s*[\[(]\s*["']([A-Za-z_0-9]+)["']"""
    return {name for name in re.findall(read, source) if not name.startswith(FOREIGN)}


def test_few_environment_variables_of_our_own():
    probe = 'os.environ["OUR_FLAG"]; os.getenv("OUR_OTHER"); os.environ.get( "CUDA_VISIBLE_DEVICES")'
    assert own_variables(probe) == {"OUR_FLAG", "OUR_OTHER"}
    shipped = [path for path in [*code_files(), *compiled_files(), ROOT / "setup.py"] if "tests" not in path.parts]
    ours = set().union(*(own_variables(path.read_text()) for path in shipped))
    assert len(ours) <= OURS_AT_MOST, ours


#: Hosts that a committed file may name: addresses of documents and namespaces, never of something to download from.
HOSTS = ("arxiv.org", "keepachangelog.com", "semver.org", "www.apache.org", "www.w3.org", "example.com", "example.org")
HOST = r"(?i)\b(?:[a-z0-9-]+\.)+(?:org|com)\b"
INDEX = r"--(?:extra-)?index-" + r"url|--find-" + r"links|--trusted-" + r"host"
MACHINE = r"(?<![\w.:~<$}])/(?:work|home|root|Users|mnt|opt)/\w+"


def test_no_host_index_or_machine_path_is_committed():
    files = text_files()
    assert {ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci/run"} <= set(files)
    assert not lines_matching(HOST, files, HOSTS)
    assert not lines_matching(INDEX, files)
    assert not lines_matching(MACHINE, [path for path in files if path != Path(__file__).resolve()])


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (HOST, "https://files.registry" + ".org/simple"),
        (HOST, "see Registry" + ".Example-Host" + ".com."),
        (INDEX, "pip install --extra-index" + "-url X"),
        (MACHINE, "open('/home/me/file')"),
        (MACHINE, "see /opt/wheels"),
    ],
)
def test_the_patterns_find(pattern, text):
    assert re.search(pattern, text)
    assert not re.search(pattern, "torch.nn.functional.linear(x, w); a/work/b; https://; runs/home/x")


def test_public_names_are_documented():
    assert gk.__all__ == sorted(gk.__all__), "kept sorted so that a duplicate shows"
    for name in gk.__all__:
        thing = getattr(gk, name)
        doc = inspect.getdoc(thing) or ""
        own = thing.__dict__.get("__doc__") if inspect.isclass(thing) else doc
        assert own and len(doc) > 30, f"{name} has no docstring of its own"
        if inspect.isfunction(thing):
            assert "[" in doc, f"{name} does not say which shapes it takes"
            assert re.search(r"Returns|result|``.*\[N", doc), f"{name} does not say what it returns"
            assert re.search(r"Raises|[Ee]rrors", doc), f"{name} does not say what it raises"
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    assert inspect.getdoc(value), f"{name}.{member} has no docstring"


def test_versions_agree():
    assert PROJECT["version"] == gk.__version__
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == gk.__version__


def test_the_library_depends_on_torch_and_triton_only():
    assert [Requirement(text).name for text in PROJECT["dependencies"]] == ["torch", "triton"]
    assert Requirement(PROJECT["dependencies"][0]).specifier.contains(torch.__version__.split("+")[0])


def test_constraints_cover_what_is_asked_for():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line)
            assert match, f"{line!r} is not one exact version without a build label"
            pins[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    assert next(iter(pins)) == "torch"
    asked = PROJECT["dependencies"] + [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    for requirement in map(Requirement, asked):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in ("setuptools", "tomli"):
            continue  # the build's own tool, and a stand-in for older Pythons than the one tested
        assert name in pins, f"{name} has no tested version in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow the tested {pins[name]}"


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_commands_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert {"test"} <= named <= makefile_targets()


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(path):
    document = ROOT / path
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{path} links to {target}"
    for file, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", document.read_text()):
        headings = re.findall(r"^#+ (.*)$", ((document.parent / file) if file else document).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^exec make test\b", script.read_text(), re.MULTILINE)


def test_readme_examples_run_as_printed(capsys):
    """In order and in one namespace; the reader's own model, optimizer, batches and loss are given."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 61, (8, 13))
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    batch = {"task": ["gcd", "sorting"] * 4, "prompt": list(range(8)), "mask": mask, "tokens": tokens}

    def row_losses(model, batch):
        logits = model(batch["tokens"], attention_mask=batch["mask"]).logits[:, :-1]
        keep = batch["mask"][:, 1:]
        picked = logits.log_softmax(-1).gather(-1, batch["tokens"][:, 1:, None])[..., 0]
        return -(picked * keep).sum(1) / keep.sum(1)

    before = [parameter.clone() for parameter in model.parameters()]
    namespace = {
        "model": model,
        "batches": [batch] * 3,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "row_losses": row_losses,
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "it trains"
    printed = capsys.readouterr().out
    assert len(re.findall(r"^gcd: U = \S+ \+- [\d.e-]+ from 4 prompts$", printed, re.MULTILINE)) == 3
    assert len(namespace["next_tasks"]) == 8
    x, dy, r = namespace["x"], namespace["dy"], namespace["r"]
    torch.testing.assert_close(r.weight_grad, dy.T @ x, rtol=1e-4, atol=1e-3)


def test_wheel_holds_the_library_and_nothing_else(tmp_path):
    """Built from a copy, without network: subpackages, configs, the typing marker and the module are easily lost.

    Without the CUDA kernels, which take minutes: setup.py builds both the same way.
    """
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "_C*")
    for name in ("gradnorm_kernels", "python", "tests", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(tmp_path)]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"GRADNORM_BUILD_CUDA": "0", "PATH": tools}
    result = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr
    wheel_name = result.stdout.splitlines()[-1]
    with zipfile.ZipFile(tmp_path / wheel_name) as wheel:
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gradnorm_kernels").rglob("*")
        if path.is_file() and path.suffix in (".py", ".json", ".typed")
    }
    modules = {name for name in shipped if re.fullmatch(r"gradnorm_kernels/_C\.[\w.-]+\.so", name)}
    assert len(modules) == 1 and "-none-any" not in wheel_name
    assert shipped - modules == expected
    assert "gradnorm_kernels/py.typed" in shipped
