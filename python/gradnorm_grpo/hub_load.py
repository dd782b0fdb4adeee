"""Rows of a data set, from the Hub or from a local copy, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HUB_TIMEOUT = 5.0  # seconds until the Hub counts as out of reach


def load_rows(task: str, dataset: str, path: str, subset: str, split: str) -> Any:
    """The rows of one split, a `datasets.Dataset`: its items are dictionaries from column to value.

    ``path`` names a local file (json, jsonl, csv or parquet) or a folder of them and goes before ``dataset``, a name on
    the Hub. Raises UserError when nothing can be loaded; an unreachable Hub is noticed within seconds, and then only a
    copy that an earlier run left in the cache of `datasets` is used.
    """
    import datasets

    datasets.disable_progress_bars()
    if bool(dataset) == bool(path):
        raise UserError(
            f"task {task!r} needs either dataset (a name on the Hub, such as Jiayi-Pan/Countdown-Tasks-3to4) or path "
            f"(a local copy), got dataset={dataset!r} and path={path!r}"
        )
    name = path or dataset
    try:
        if path:
            return _load_local(task, Path(path), subset, split)
        reason = _why_unreachable(dataset)
        with _cache_only(bool(reason)):
            return datasets.load_dataset(dataset, subset or None, split=split)
    except UserError:
        raise
    # Whatever goes wrong in there, a server's answer or a broken file, is one sentence to the person who named it.
    except Exception as error:
        if not path and reason:
            cause = f"the Hub cannot be reached ({reason}) and there is no copy in the cache"
        else:
            cause = _first_line(error.__cause__ or error)
        raise UserError(
            f"the data set {name!r} of task {task!r} could not be loaded: {cause}; "
            + ("check path, subset and split" if path else "give path= of a local copy, or check subset and split")
        ) from error


def _load_local(task: str, path: Path, subset: str, split: str) -> Any:
    import datasets

    if path.is_dir():
        return datasets.load_dataset(str(path), subset or None, split=split)
    if not path.is_file():
        raise UserError(f"path of task {task!r}, {path}, is neither a file nor a folder")
    if path.suffix not in READERS:
        raise UserError(f"path of task {task!r}, {path}, must end in one of {', '.join(READERS)}, or be a folder")
    if subset:
        raise UserError(f"subset of task {task!r} must be left out for a single file, got {subset!r}")
    return datasets.load_dataset(READERS[path.suffix], data_files={"train": str(path)}, split=split)


def _why_unreachable(dataset: str) -> str:
    """Empty if the Hub answers at all, whatever it answers; `load_dataset` alone would try for half a minute."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if datasets.config.HF_HUB_OFFLINE:
        return "offline mode"
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(dataset, timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return ""
    except Exception as error:  # the HTTP client's own errors, which differ from one version of the library to the next
        return _first_line(error)
    return ""


@contextmanager
def _cache_only(active: bool) -> Iterator[None]:
    """Inside, `datasets` asks no server: it takes what is in its cache, or gives up at once."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or active
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[0].split())[:200] if text else type(error).__name__
