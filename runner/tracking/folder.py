"""What a run's folder says about itself: environment.json, status.json, resolved.yaml, metrics.jsonl, events.jsonl.

Everything here is read by the report, by sweeps and by people, so every file is written whole (temporary file, then
rename) or line by line, and none of them ever holds a secret or the machine's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import psutil
import yaml

from runner import lock, provenance
from runner.config import option as options
from runner.config.schema import Config
from runner.cores import available_cores
from runner.errors import UserError
from runner.redaction import REDACTED as REDACTED
from runner.redaction import redacted as redact
from runner.storage import atomic_write
from runner.tracking.base import State

PACKAGES = (  # beside those of the options
    "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "hydra-core", "omegaconf", "ray",
    "numpy", "numba", "triton", "flash-attn", "math-verify", "sympy",
)  # fmt: skip


def plain_config(cfg: Config, *, secrets: bool = False) -> dict[str, Any]:
    """The config as dicts, lists and scalars (enums by name); secrets are redacted unless `secrets` (to make a hash of it)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {plain(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    config: dict[str, Any] = plain(dataclasses.asdict(cfg))
    return config if secrets else redact(config)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a plain config that is no dict with keys."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def write_resolved(run_dir: Path, cfg: Config) -> None:
    """resolved.yaml: the whole config as it ran, secrets redacted."""
    atomic_write(run_dir / "resolved.yaml", yaml.safe_dump(plain_config(cfg), sort_keys=False, width=120, allow_unicode=True))


# ---- environment.json


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    """Through NVML by way of nvidia-smi: asking torch would start a CUDA context in the driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.count(",") == 2]
    return [{"name": name, "memory_mib": memory, "driver": driver} for name, memory, driver in rows]


def environment(cfg: Config) -> dict[str, Any]:
    """What a result depends on besides the config. No host, user or environment-variable values."""
    from runner.precision import cpu_matmul  # reports and sweeps read folders without torch

    way, reason = cpu_matmul.choose(cfg.precision.cpu_matmul)
    versions = {}
    for package in (*PACKAGES, *options.packages()):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": available_cores(),
        "cpu_bf16_matmul": {"way": way.name, "reason": reason},
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "packages": versions,
        "git": provenance.commit(),
    }


def write_environment(run_dir: Path, cfg: Config) -> None:
    atomic_write(run_dir / "environment.json", json.dumps(environment(cfg), indent=2) + "\n")


# ---- status.json

STATES: tuple[State, ...] = get_args(State)


def write_status(run_dir: Path, state: State, *, step: int, message: str = "", summary: dict[str, float] | None = None) -> None:
    """status.json. `step`: steps done. Keeps the first start; `active_seconds` adds up over resumed attempts. A damaged file
    counts as none."""
    if state not in STATES:
        raise ValueError(f"state {state!r} is none of {', '.join(STATES)}")
    now = time.time()
    before: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        before = read_status(run_dir) or {}
    same_process = before.get("pid") == os.getpid() and before.get("state") == "running"
    attempt_started = before["attempt_started"] if same_process else now
    earlier = before.get("earlier_seconds", 0.0) if same_process else before.get("active_seconds", 0.0)
    status = {
        "state": state,
        "step": step,
        "message": message,
        "pid": os.getpid(),
        "attempt": before.get("attempt", 0) + (0 if same_process else 1),
        "started": before.get("started", now),
        "attempt_started": attempt_started,
        "updated": now,
        "earlier_seconds": earlier,
        "active_seconds": round(earlier + now - attempt_started, 3),
        "summary": {key: encode_number(value) for key, value in (summary or {}).items()},
    }
    atomic_write(run_dir / "status.json", json.dumps(status, indent=2) + "\n")


_STATUS = {"state": str, "step": int, "message": str, "pid": int, "attempt": int, "summary": dict} | dict.fromkeys(
    ("started", "attempt_started", "updated", "earlier_seconds", "active_seconds"), (int, float)
)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of status.json, or None where there is none. A run that was killed still says "running": see `run_state`.

    Raises UserError for a file that is damaged.
    """
    path = run_dir / "status.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        wrong = [key for key, kind in _STATUS.items() if not isinstance(found[key], kind)]
        if wrong or found["state"] not in STATES or not all(map(math.isfinite, (found["started"], found["attempt_started"]))):
            raise ValueError(f"{wrong[0] if wrong else 'state or a time'} makes no sense")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read: {what}", fix="remove that file") from error
    return found


def run_state(run_dir: Path) -> str:
    """The state for people: as in status.json, but "killed" for a run that says running and whose process is gone, and "unknown"
    where status.json is damaged."""
    try:
        status = read_status(run_dir)
    except UserError:
        return "unknown"
    if status is None:
        return "not started"
    if status["state"] == "running" and not lock.holder(run_dir):
        # no lock at all: a run of before there were any
        unlocked = not (run_dir / lock.NAME).exists()
        return "running" if unlocked and _is_same_process(status["pid"], status["attempt_started"]) else "killed"
    return str(status["state"])


def _is_same_process(pid: int, alive_at: float) -> bool:
    """Whether the process that had this id at that time still runs (ids are used again)."""
    try:
        return psutil.Process(pid).create_time() <= alive_at + 1.0
    except psutil.Error:
        return False


# ---- metrics.jsonl and events.jsonl


def encode_number(value: float) -> float | str:
    """JSON has no NaN or infinity: they are written as strings that float() reads back."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl as one dict per step (lines of the same step merged), by ascending step, `step` included as a float.

    A last line cut short by a kill is left out; a damaged line elsewhere raises UserError with its number.
    """
    steps: dict[int, dict[str, float]] = {}
    for row in read_jsonl(run_dir / "metrics.jsonl", metrics_problem):
        steps.setdefault(int(row["step"]), {}).update({key: float(value) for key, value in row.items()})
    return [steps[step] for step in sorted(steps)]


def rollout_files(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of rollouts/step_N.jsonl by step; whatever else lies there is not ours."""
    named = ((re.fullmatch(r"step_(\d{1,18})\.jsonl", path.name), path) for path in (run_dir / "rollouts").glob("step_*.jsonl"))
    return sorted((int(match[1]), path) for match, path in named if match and path.is_file())


Problem = Callable[[dict[str, Any]], str | None]  # what is wrong with a row


def metrics_problem(row: dict[str, Any]) -> str | None:
    if problem := step_problem(row):
        return problem
    for key, value in row.items():
        try:
            float(value)
        except (TypeError, ValueError, OverflowError):
            return f"{key!r} is no number"
    return None


def event_problem(row: dict[str, Any]) -> str | None:
    kinds = {"kind": str, "message": str, "attempt": int, "data": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(row.get(key), kind)]
    return f"{wrong[0]!r} is missing or of another kind" if wrong else step_problem(row)


def step_problem(row: dict[str, Any]) -> str | None:
    step = row.get("step")
    return None if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else "it has no step"


def read_jsonl(path: Path, problem: Problem | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file of ours; [] where there is no file. UserError with the line that is damaged."""
    rows, damaged = salvage_jsonl(path, problem)
    if damaged:
        raise UserError(damaged[0], key=str(path), fix="remove that line")
    return rows


def salvage_jsonl(path: Path, problem: Problem | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, what is wrong with each damaged line) of a JSONL file of ours; a last line cut short by a kill is neither."""
    if not path.exists():
        return [], []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            wrong = (problem(row) if problem else None) if isinstance(row, dict) else "it is no object"
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline after it: the process was killed while writing
                break
            wrong = str(error) or type(error).__name__
        if wrong:
            damaged.append(f"line {number} is damaged: {wrong}")
        else:
            rows.append(row)
    return rows, damaged
