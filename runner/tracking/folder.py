"""What a run's folder says about itself: environment.json, status.json, resolved.yaml, metrics.jsonl, events.jsonl.

Everything here is read by the report, by sweeps and by people, so every file is written whole (temporary file, then
rename) or line by line, and none of them ever holds a secret or the machine's name.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import time
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
import yaml

from runner.errors import UserError
from runner.schema import Config

REDACTED = "<redacted>"
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "hydra-core", "omegaconf", "ray", "wandb",
    "numpy", "numba", "triton", "megatron-core", "sglang", "flash-attn", "transformer-engine",
    "math-verify", "sympy",
)  # fmt: skip
# The last word of a key decides: `hf_token` is a secret, `max_tokens_per_gpu` and `moe_token_dispatcher` are not.
_SECRET_KEY = re.compile(r"(^|[_\-.])(token|passw(or)?d|secret|credentials?|api_?key|access_?key|private_?key)$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^/\s:@]+:)[^/\s@]+@")


def redact(value: Any, key: str = "") -> Any:
    """A copy in which values under secret-looking keys, and passwords inside URLs, are replaced."""
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    if value not in (None, "") and _SECRET_KEY.search(key):
        return REDACTED
    return _URL_PASSWORD.sub(rf"\1{REDACTED}@", value) if isinstance(value, str) else value


def plain_config(cfg: Config) -> dict[str, Any]:
    """The config as dicts, lists and scalars (enums by name), secrets redacted."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {plain(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return redact(plain(dataclasses.asdict(cfg)))


def atomic_write(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a kill at any moment, sees the old file or the new one and nothing between.

    Raises UserError where the file cannot be written (full disk, read-only folder).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}", fix="free some space or set outputs_dir=<a writable folder>"
        ) from error


def write_resolved(run_dir: Path, cfg: Config) -> None:
    """resolved.yaml: the whole config as it ran, secrets redacted."""
    atomic_write(run_dir / "resolved.yaml", yaml.safe_dump(plain_config(cfg), sort_keys=False, width=120))


# ---- environment.json


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a repository or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


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


def environment() -> dict[str, Any]:
    """What a result depends on besides the config. No host, user or environment-variable values."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "packages": versions,
        "git": _git_state(Path(__file__).parent),
    }


def write_environment(run_dir: Path) -> None:
    atomic_write(run_dir / "environment.json", json.dumps(environment(), indent=2) + "\n")


# ---- status.json

STATES = ("running", "completed", "failed", "interrupted", "stopped")


def write_status(run_dir: Path, state: str, *, step: int, message: str = "", summary: dict[str, float] | None = None) -> None:
    """status.json. `step`: steps done. Keeps the first start; `active_seconds` adds up over resumed attempts."""
    if state not in STATES:
        raise ValueError(f"state {state!r} is none of {', '.join(STATES)}")
    now = time.time()
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


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of status.json, or None where there is none. A run that was killed still says "running": see `run_state`."""
    path = run_dir / "status.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", fix="remove that file; the run can still be resumed") from error


def run_state(run_dir: Path) -> str:
    """The state for people: as in status.json, but "killed" for a run that says running and whose process is gone."""
    status = read_status(run_dir)
    if status is None:
        return "not started"
    if status["state"] == "running" and not _is_same_process(status["pid"], status["attempt_started"]):
        return "killed"
    return status["state"]


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
    for row in read_jsonl(run_dir / "metrics.jsonl"):
        steps.setdefault(int(row["step"]), {}).update({key: float(value) for key, value in row.items()})
    return [steps[step] for step in sorted(steps)]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file of ours; [] where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no newline after it: the process was killed while writing
                break
            raise UserError(f"line {number} is damaged: {error}", key=str(path), fix="remove that line") from error
    return rows
