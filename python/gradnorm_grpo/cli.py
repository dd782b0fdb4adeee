"""The command line: `train`, `probe`, `study`, `frozen`, `estimators`, `intervals`, `lags`, `cost` and `report`."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .errors import UserError, all_of

if TYPE_CHECKING:
    from .settings import Settings

USAGE = """\
usage: train_grpo.py train  --preset NAME [--setting value ...]   train; NAME: {presets}
       train_grpo.py train  --config FILE [--setting value ...]   train with a YAML file
       train_grpo.py train  --resume RUN_DIR|CHECKPOINT|auto      continue an interrupted run
       train_grpo.py probe  --preset NAME [--setting value ...]   measure every task without training
       train_grpo.py study  --preset NAME [--seeds 1 2 3] [--arms uniform ...] [--jobs 2] [--setting value ...]
                                                                  every arm and seed, and the answers; continues an
                                                                  interrupted study
       train_grpo.py study  --preset NAME --frozen [...]          the same without training: gradients at fixed weights
       train_grpo.py frozen --config FILE                         one run of such a study
       train_grpo.py estimators --preset NAME [--setting value ...]  the estimators side by side on stored rollouts
       train_grpo.py intervals --preset NAME [--seeds 1 2 3] [--setting value ...]
                                                                  how often each interval of U holds it
       train_grpo.py lags --preset NAME [--seeds 1 2 3] [--setting value ...]
                                                                  how long a task's gradient keeps its direction
       train_grpo.py cost --preset NAME [--seeds 1 2 3] [--setting value ...]
                                                                  the extra seconds that a digit of U costs, by method
       train_grpo.py report DIR                                   a run's table and HTML report, or a study's answers

settings, as options or as keys of the YAML file:
"""
COMMANDS = ("train", "probe", "study", "frozen", "estimators", "intervals", "lags", "cost", "report")
#: The study's commands, each a function of its module with the command's name.
_OF_STUDY = {"study": "run", **{name: name for name in ("estimators", "intervals", "lags", "cost")}}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 the machine failed, 2 a wrong request, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Of the processes of a launcher the first one speaks. Brackets in a task's name or a path are no markup.
    console = Console(quiet=_process("RANK") > 0, markup=False)
    try:
        return _run(arguments, console)
    except UserError as error:
        if not error.shared or _process("LOCAL_RANK") == 0:
            _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if _process("RANK") == 0:
            _complain("interrupted; `train --resume RUN_DIR` goes on from the run's last checkpoint, if it has one")
        return 130
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if not denied and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        where = f" while {'opening' if denied else 'writing'} {error.filename}" if error.filename else ""
        advice = "allow this user to write there, or name another folder" if denied else "free some space"
        _complain(
            f"{error.strerror}{where}: everything logged before is intact; {advice}, then go on with "
            "`train --resume RUN_DIR` if the run has a checkpoint, or start it again"
        )
        return 1


def _process(variable: str, default: int = 0) -> int:
    """A number that torchrun and accelerate give each of their processes: RANK, LOCAL_RANK or WORLD_SIZE."""
    return int(os.environ.get(variable, default))


def _complain(message: str) -> None:
    sys.stdout.flush()
    print(f"train_grpo.py: error: {message}", file=sys.stderr)


def _run(arguments: list[str], console: Console) -> int:
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help") or "--help" in arguments or "-h" in arguments:
        _print_help()
        return 0
    all_of("the command", [command], COMMANDS)
    processes = _process("WORLD_SIZE", 1)
    if processes > 1 and command != "train":
        raise _shared(UserError(f"`{command}` runs in one process, and {processes} were launched: start it without"))
    if command == "report":
        return _report(arguments, console)
    _quiet()
    if command in _OF_STUDY:
        module = importlib.import_module(f".study.{_OF_STUDY[command]}", __package__)
        return int(getattr(module, command)(arguments, console))
    if command == "frozen":
        from .parse import parse_frozen
        from .study.frozen import measure

        folder = measure(*parse_frozen(arguments), console)
        console.print(f"measured: {folder}", highlight=False, soft_wrap=True)
        return 0
    from .parse import parse_settings

    try:
        settings, name = parse_settings(arguments)
    except UserError as error:
        raise _shared(error) from error.__cause__
    if command == "probe":
        from .probe import probe

        return _finish(probe(settings, name, console), console)
    return _train(settings, name, console)


def _shared(error: UserError) -> UserError:
    """An error that all processes of a launcher have alike."""
    error.shared = True
    return error


def _train(settings: Settings, name: str, console: Console) -> int:
    from .train import LoopTraining, Training

    processes = _process("WORLD_SIZE", 1)
    if settings.engine == "loop" and processes > 1:
        raise _shared(
            UserError(f"engine 'loop' is one process, and {processes} were launched: give --engine trl, or launch one")
        )
    training: Training
    if settings.engine == "trl":
        from .engine_trl import TrlTraining

        training = TrlTraining(settings, name, console)
    else:
        training = LoopTraining(settings, name, console)
    folder = training.run()
    if training.interrupted:
        console.print(
            f"stopped after step {training.step_number}; go on with: train_grpo.py train --resume {folder}",
            highlight=False,
            soft_wrap=True,
        )
        return 130
    return _finish(folder, console) if _process("RANK") == 0 else 0


def _finish(folder: Path, console: Console) -> int:
    from .report import print_table, write_report

    try:
        report = write_report(folder)
        print_table(folder, console)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"no report for {folder}: {' '.join(str(error).split())}") from error
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    return 0


def _report(arguments: list[str], console: Console) -> int:
    if len(arguments) != 1:
        raise UserError("report needs one argument, the folder of a run or of a study")
    folder = Path(arguments[0])
    if (folder / "study.json").is_file():
        from .study.run import conclude

        conclude(folder, console)
        return 0
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} has no run.json or study.json: give the folder of a run or of a study")
    return _finish(folder, console)


def _print_help() -> None:
    from .parse import preset_names
    from .settings import Settings

    print(USAGE.format(presets=", ".join(preset_names())))
    for spec in dataclasses.fields(Settings):
        default = "" if spec.default is dataclasses.MISSING else f" [{spec.default!r}]"
        print(f"  --{spec.name}{default}  {spec.metadata['help']}")


def _quiet() -> None:
    """Silence loading bars and notices of the libraries, which would bury the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
