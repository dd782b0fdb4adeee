"""Runs of engine 'trl' on several processes, for test_engine_trl_runs: forked from one that has imported everything.

``python -m tests.app.trl_launch FOLDER`` runs SCENARIOS there. A launch leaves FOLDER/NAME.json (the exit codes) and
the standard output and error of each process beside it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from gradnorm_grpo import cli, engine_trl
from gradnorm_grpo.tasks import Task

CONFIG: dict[str, Any] = {
    "model": "tiny",
    "tiny_layers": 1,
    "tiny_hidden_size": 32,
    "num_threads": 1,
    "prompt_template": "{question} = ",
    "tasks": [{"name": "compare", "source": "synthetic"}, {"name": "maximum", "source": "synthetic"}],
    "max_steps": 3,
    "num_generations": 4,
    "per_device_train_batch_size": 48,
    "max_completion_length": 3,
    "loss_type": "grpo",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "eval_prompts": 3,
    "gain_window": 1,
    "save_steps": 1,
    "cache_dir": "",
    "engine": "trl",
}


def seeded(self: Any, prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
    """Completions that depend on the prompt and the place in its group alone, so that every layout has the same."""
    found = []
    for row, ids in enumerate(prompt_ids):
        prompt = self.processing_class.decode(ids)
        member = row % self.num_generations if self.model.training else 0
        generator = torch.Generator().manual_seed(zlib.crc32(f"{prompt} {member}".encode()))
        letters = "<=>" if prompt.startswith("compare") else "789"
        letter = letters[int(torch.randint(3, (), generator=generator))]
        found.append([self.processing_class.convert_tokens_to_ids(letter), self.processing_class.eos_token_id])
    return found, None


def parity(self: Any, text: str, example: Any) -> float:
    """A reward that a model with random weights earns about every other time."""
    return 1.0 if text == example.answer else float(ord(text[0]) % 2) if text else 0.0


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a run's log; none before it is there."""
    file = folder / "metrics.jsonl"
    whole = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [line for line in map(json.loads, whole) if line["kind"] == kind]


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class Launch:
    """A process per list of arguments, each running the command line with a launcher's variables."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[Sequence[str]], patch: str = "") -> None:
        """``patch``: "completions" for those of :func:`seeded`, "rewards" for those of :func:`parity`."""
        self.folder, self.name = folder, name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.children = []
        for rank, own in enumerate(arguments):
            child = os.fork()
            if child == 0:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(arguments)}
                world |= {"LOCAL_WORLD_SIZE": len(arguments), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                self._work(rank, own, world if len(arguments) > 1 else {}, patch)
            self.children.append(child)

    def _work(self, rank: int, arguments: Sequence[str], world: dict[str, Any], patch: str) -> None:
        code = 70
        try:
            for stream, suffix in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.folder / f"{self.name}.{rank}.{suffix}", os.O_CREAT | os.O_WRONLY), stream)
            os.environ.update({key: str(value) for key, value in world.items()})
            if patch == "completions":
                engine_trl.TaskTrainer._generate_single_turn = seeded
            elif patch == "rewards":
                Task.score = parity
            code = cli.main(list(arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: signal.Signals, ranks: Sequence[int], when: Callable[[], bool]) -> None:
        """Wait until ``when``, then send the signal to the processes of these ranks."""
        deadline = time.monotonic() + 200
        while not when() and time.monotonic() < deadline and not any(map(_ended, self.children)):
            time.sleep(0.01)
        for rank in ranks:
            os.kill(self.children[rank], number)

    def wait(self) -> None:
        """Write the exit codes, -N after signal N; a process that does not end in time is killed."""
        deadline, codes = time.monotonic() + 200, {}
        while len(codes) < len(self.children):
            for rank, child in enumerate(self.children):
                if rank in codes:
                    continue
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        (self.folder / f"{self.name}.json").write_text(json.dumps([codes[rank] for rank in sorted(codes)]))


def main(folder: Path) -> None:
    """All scenarios, one after another."""
    config, other = folder / "config.yaml", folder / "other.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    missing = {"name": "file", "source": "jsonl", "path": str(folder / "missing.jsonl"), "verifier": "exact"}
    other.write_text(yaml.safe_dump({**CONFIG, "tasks": [*CONFIG["tasks"], missing]}))

    def train(name: str, *more: str) -> list[str]:
        return ["train", "--config", str(config), "--output_dir", str(folder / name), *more]

    half = ("--per_device_train_batch_size", "24")
    Launch(folder, "one", [train("one")], "completions").wait()
    Launch(folder, "two", [train("two", *half)] * 2, "completions").wait()
    wrong = ["train", "--config", str(other), "--output_dir", str(folder / "wrong")]
    Launch(folder, "wrong", [train("wrong", *half), wrong]).wait()
    long = ("--max_steps", "40", "--save_steps", "3", "--save_total_limit", "20")
    # With all that a checkpoint has to hold: a sampler that follows U, several updates on a generation, a reference.
    follow = (
        "--sampling_strategy",
        "proportional",
        "--sampling_floor",
        "0.8",
        "--beta",
        "0.05",
        "--num_iterations",
        "2",
    )
    follow += ("--warm_start_steps", "2", "--warm_start_examples", "8", "--warm_start_batch_size", "4")
    follow += ("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2")
    whole = train("whole", *follow, "--max_steps", "6", "--save_steps", "3")
    Launch(folder, "whole", [whole], "rewards").wait()
    killed = Launch(folder, "killed", [train("killed", *follow, *long)], "rewards")
    killed.send(signal.SIGKILL, [0], lambda: len(lines(folder / "killed")) >= 5)
    killed.wait()
    again = ["train", "--resume", str(folder / "killed" / "checkpoint-6"), "--max_steps", "6"]
    Launch(folder, "again", [again], "rewards").wait()
    lost = Launch(folder, "lost", [train("lost", *half, *long)] * 2)
    lost.send(signal.SIGKILL, [1], lambda: len(lines(folder / "lost")) >= 2)
    lost.wait()
    stopped = Launch(folder, "stopped", [train("stopped", *half, *long)] * 2)
    stopped.send(signal.SIGTERM, [0, 1], lambda: len(lines(folder / "stopped")) >= 2)
    stopped.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
