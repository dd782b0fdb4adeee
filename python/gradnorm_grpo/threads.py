"""Processor threads: what OpenMP does while a thread waits, and how many threads torch uses. Imports no torch.

OpenMP threads that wait for work keep a core busy unless they are told not to. Beside another busy process that slows
down a model of small layers several times over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

# What a user sets to decide how OpenMP threads wait: the standard's variable, and those of the GNU and LLVM runtimes.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_SYSTEM = Path("/sys")


def wait_passively() -> None:
    """Set ``OMP_WAIT_POLICY=passive`` for this process unless the user has decided; before torch is imported only."""
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def waiting() -> str:
    """How OpenMP threads wait, as the environment says it: "OMP_WAIT_POLICY=passive"; "" where it says nothing."""
    return " ".join(f"{name}={os.environ[name]}" for name in _WAITING if name in os.environ)


def choose_threads(asked: int, system: Path = _SYSTEM) -> tuple[int, str]:
    """The number of threads for torch and the reason for it; 0 leaves torch's own number.

    ``asked``, the setting num_threads, comes first, then the environment (torch reads it itself), then the least of:
    the cores that this process may use, a core with two hardware threads counted once, and its cgroup's quota of
    processor time. ``system``: where Linux describes the machine.
    """
    if asked:
        return asked, "num_threads"
    if given := [f"{name}={os.environ[name]}" for name in _COUNTS if name in os.environ]:
        return 0, " ".join(given)
    if not hasattr(os, "sched_getaffinity"):
        return 0, "torch's choice"
    usable = os.sched_getaffinity(0)
    found = {"physical cores of this process": physical_cores(usable, system)}
    if quota := cgroup_quota(system):
        found["processors of the cgroup's quota"] = max(1, int(quota))
    reason = min(found, key=found.__getitem__)
    return found[reason], reason


def physical_cores(processors: Iterable[int], system: Path = _SYSTEM) -> int:
    """Different cores among logical processors; a processor that the system does not describe counts as a core."""
    cores = set()
    for processor in processors:
        file = system / f"devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
        try:
            cores.add(file.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(processor))
    return max(1, len(cores))


def cgroup_quota(system: Path = _SYSTEM) -> float | None:
    """Processors' worth of time that the control group of this process may use; None where there is no limit.

    Inside a container its own group is the root of the tree, which is what is read.
    """
    group = system / "fs/cgroup"
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / f"cpu/cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # "max" means no limit
        return None
