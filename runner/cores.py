"""How many CPU cores this process may use: the scheduler's mask, and the quota that a container was given.

torch and OpenMP count the host's cores. In a container with a quota of two they would start a thread for each of 64, and each
would wait for all the others' turns. Nothing here imports torch: `respect_quota` must come before it.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUPS_OF_THIS_PROCESS = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")


def schedulable_cores() -> int:
    """Cores that the scheduler may put this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(root: Path | None = None, membership: Path | None = None) -> float | None:
    """CPU seconds per second that the tightest control group of this process allows, None without a limit.

    Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`), from this process's group up to the root of what is mounted here.
    """
    folders = _folders(root or CGROUP_ROOT, membership or CGROUPS_OF_THIS_PROCESS)
    return min((limit for folder in folders for limit in _limits(folder)), default=None)


def available_cores() -> int:
    """Threads that are worth starting: at least 1, no more than the mask and the quota's whole cores."""
    limit = quota()
    cores = schedulable_cores()
    return cores if limit is None else max(1, min(cores, int(limit)))


def default_threads() -> int:
    """Threads of a computation for which no number was asked: OMP_NUM_THREADS, else one for each available core."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, min(int(asked), available_cores())) if asked.isdigit() else available_cores()


def respect_quota() -> None:
    """Tell OpenMP, and so torch and every child process, about a quota; a number that the user set stays."""
    if "OMP_NUM_THREADS" not in os.environ and available_cores() < schedulable_cores():
        os.environ["OMP_NUM_THREADS"] = str(available_cores())


def cpu_flags() -> set[str]:
    """What Linux says that this CPU can do: `avx512_bf16`, `amx_bf16`; nothing elsewhere."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def _folders(root: Path, membership: Path) -> list[Path]:
    """Folders of the control groups that limit this process's CPU time."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mounts = [root]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu", root / "cpu,cpuacct"]
        else:
            continue
        parts = Path(path.strip()).relative_to("/").parts if path.startswith("/") else ()
        # Inside a container the path is often that of the host: what is not mounted here is passed over.
        folders += [mount.joinpath(*parts[:count]) for mount in mounts for count in range(len(parts), -1, -1)]
    return folders


def _limits(folder: Path) -> list[float]:
    try:
        if (folder / "cpu.max").is_file():
            allowed, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
        else:
            allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if allowed in ("max", "-1"):
            return []
        return [int(allowed) / int(period or 100_000)]
    except (OSError, ValueError, ZeroDivisionError):
        return []
