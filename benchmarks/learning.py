"""Does every precision learn? Runs the default experiment per precision and seed, each in a fresh process.

    python -m benchmarks.learning [--precisions int4_qat bf16 fp8_rollout] [--seeds 0 1 2] [key=value ...]

Prints one row per run: mean reward over the first and the last 5 steps, evaluation, mismatch, wall time and peak memory
(of the process, resident).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean


@dataclass(frozen=True)
class Finished:
    """A run that ended well.

    rows      metrics.jsonl
    seconds   of the whole process; the run's own where it was there already
    peak_gib  of the process, resident; 0 where it was there already
    """

    rows: list[dict[str, float]]
    seconds: float
    peak_gib: float


def finished(name: str, overrides: list[str], root: Path) -> Finished:
    """The run of this name under `root`: read where it is complete, else made in a fresh process. A failure ends the program."""
    file, peak = root / name / "status.json", 0.0
    status = json.loads(file.read_text()) if file.is_file() else {}
    seconds = status.get("active_seconds", 0.0)
    if status.get("state") != "completed":
        root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "runner", *overrides, f"outputs_dir={root}", f"run_name={name}"]
        started = time.perf_counter()
        with (root / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            _, code, usage = os.wait4(process.pid, 0)
        seconds, peak = time.perf_counter() - started, usage.ru_maxrss / 2**20
        if os.waitstatus_to_exitcode(code) != 0:
            sys.exit((root / f"{name}.log").read_text()[-3000:])
    return Finished([json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()], seconds, peak)


def run(precision: str, seed: int, overrides: list[str], root: Path) -> dict[str, float | str]:
    done = finished(f"{precision}_{seed}", [f"precision={precision}", f"seed={seed}", *overrides], root)
    evals = [row["eval/arithmetic"] for row in done.rows if "eval/arithmetic" in row]
    return {
        "precision": precision,
        "seed": str(seed),
        "first": mean(row["rollout/raw_reward"] for row in done.rows[:5]),
        "last": mean(row["rollout/raw_reward"] for row in done.rows[-5:]),
        "eval": evals[-1] if evals else float("nan"),
        "mismatch": mean(row["train/train_rollout_logprob_abs_diff"] for row in done.rows[-5:]),
        "seconds": done.seconds,
        "peak_gib": done.peak_gib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["int4_qat", "bf16", "fp8_rollout"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    print("| precision | seed | reward, first 5 | reward, last 5 | eval | logprob abs diff | seconds | peak GiB |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for precision in options.precisions:
            for seed in options.seeds:
                row = run(precision, seed, options.overrides, Path(root))
                cells = [f"{value:.3g}" if isinstance(value, float) else value for value in row.values()]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
