"""attach() on two gloo processes: one estimate over all rows, the same draws everywhere, a prompt split between.

Supervised fine-tuning and distillation as well, whose losses count the tokens of both processes or of each alone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl")
ROOT = Path(__file__).resolve().parents[2]


def everywhere(value: Any) -> list[Any]:
    """What each process has, on all processes."""
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def grpo(folder: str) -> None:
    """What each process runs; an assertion that fails ends it with an error."""
    from gradnorm_kernels.integrations.trl import attach
    from tests.trl import trl_tiny as tiny
    from tests.trl.test_trl_exact import Watched, many_ends, stand_still, u_of

    # With 6 rows a process in groups of 4 the second of the three prompts of a generation lies on both.
    for accumulate, rows in (("pairs", 6), ("exact", 8)):
        for loss_type in ("dapo", "grpo"):
            settings = {"per_device_train_batch_size": rows, "steps_per_generation": 1, "ddp_backend": "gloo"}
            trainer = stand_still(folder, loss_type=loss_type, **settings)
            watched = Watched(trainer, accumulate=accumulate, keep_groups_together=accumulate == "exact")
            watched.trainer.train()
            last = watched.attached.last
            parts = sum(everywhere(watched.parts()), [])
            assert rows == 8 or {1} <= {sample for _, given in watched.opened for sample in given["sample_ids"]}
            truth, squares = u_of([sum(parts, [])] if accumulate == "exact" else parts)
            counts = {task: len({s for rows in parts for t, s, _, _ in rows if t == task}) for task in squares}
            for task, value in truth.items():
                assert abs(last[task].sq_norm - value) < 1e-4 * (abs(value) + squares[task]), (task, accumulate)
            assert {task: gradient.n for task, gradient in last.items()} == counts
            assert len(set(map(str, everywhere(dict(last))))) == 1

    trainer = tiny.grpo(
        folder, trained=many_ends(), max_steps=3, per_device_train_batch_size=48, gradient_accumulation_steps=1
    )
    attached = attach(trainer, task_sampling="proportional", correction="equal_pull")
    prompts: list[list[str]] = []
    inner = trainer._generate

    def generate(given: list[str]) -> Any:
        prompts.append(list(given))
        return inner(given)

    trainer._generate = generate
    trainer.train()
    halves = everywhere(prompts)
    for first, second in zip(*halves, strict=True):
        whole = first + second
        assert len(whole) == 96
        assert all(whole[i] == whole[i - i % 4] for i in range(96))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    tasks = everywhere([{key: value for key, value in line.items() if key.startswith("tasks/")} for line in lines])
    assert tasks[0] == tasks[1]
    assert any(len({line[f"tasks/{task}/sampling_prob"] for task in tiny.TASKS}) > 1 for line in tasks[0])
    assert any(len({line[f"tasks/{task}/weight"] for task in tiny.TASKS}) > 1 for line in tasks[0])
    assert sum(value for line in tasks[0] for key, value in line.items() if key.endswith("/n")) == 72
    for line in lines:
        drawn = {task: line[f"tasks/{task}/n"] for task in tiny.TASKS if f"tasks/{task}/n" in line}
        mean = sum(line[f"tasks/{task}/reward"] * n for task, n in drawn.items()) / sum(drawn.values())
        assert abs(mean - line["reward"]) < 1e-5
    states = everywhere((attached.state_dict(), {k: v.sum().item() for k, v in trainer.model.state_dict().items()}))
    assert states[0] == states[1]


def supervised(folder: str) -> None:
    """SFTTrainer divides its loss by the tokens of both processes or of each alone; GKDTrainer by another factor."""
    from tests.trl import test_distillation as distillation
    from tests.trl import test_sft_attach as sft
    from tests.trl.test_trl_exact import u_of

    for across in (True, False):
        settings = {"average_tokens_across_devices": across, "learning_rate": 0.0, "max_steps": 1}
        for build in (sft.sft, distillation.gkd):
            seen = distillation.Seen(build(folder, ddp_backend="gloo", **settings))
            trainer, layers = seen.trainer, seen.attached.tracker.layers
            trainer.train()
            parts = []
            for at, (inputs, names) in enumerate(zip(seen.inputs, seen.tasks, strict=True)):
                if build is sft.sft:
                    rows = zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True)
                    gradients = [sft.own_gradient(trainer.model, layers, *row, False) for row in rows]
                else:
                    gradients = [distillation.own_gradient(trainer, layers, inputs, row) for row in range(len(names))]
                tagged = enumerate(zip(names, gradients, strict=True))
                parts.append([(task, (at, row), gradient, 1.0) for row, (task, gradient) in tagged])
            truth, squares = u_of(sum(everywhere(parts), []))
            assert truth
            for task, value in truth.items():
                found = seen.attached.last[task].sq_norm
                assert abs(found - value) < 1e-4 * (abs(value) + squares[task]), (build, across, task)


WORKERS = {"grpo": grpo, "supervised": supervised}


def two_processes(module: str, worker: str, tmp_path: Path) -> None:
    """Run a worker of a module as two ranks; both have to reach its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        command = [sys.executable, "-W", "ignore", "-m", module, worker, str(tmp_path)]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=240)[0].decode())
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0].decode())
    assert (tmp_path / "done").exists(), "\n".join(output[-3000:] for output in outputs)
    assert [process.returncode for process in processes] == [0, 0], outputs


@pytest.mark.parametrize("worker", WORKERS)
def test_two_processes(tmp_path, worker):
    two_processes("tests.trl.test_trl_ranks", worker, tmp_path)


def work(workers: Mapping[str, Callable[[str], None]]) -> None:
    """What one of the processes does."""
    try:
        import torch.distributed as dist

        workers[sys.argv[1]](sys.argv[2])
        dist.barrier()
        if dist.get_rank() == 0:
            Path(sys.argv[2], "done").write_text("done")
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # not waiting for the other process, which may wait for this one


if __name__ == "__main__":
    work(WORKERS)
