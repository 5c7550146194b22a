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
from pathlib import Path
from statistics import mean


def run(precision: str, seed: int, overrides: list[str], root: Path) -> dict[str, float | str]:
    name = f"{precision}_{seed}"
    command = [
        sys.executable,
        "-m",
        "runner",
        f"precision={precision}",
        f"seed={seed}",
        f"outputs_dir={root}",
        f"run_name={name}",
    ]
    started = time.perf_counter()
    with (root / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*command, *overrides], stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit((root / f"{name}.log").read_text()[-3000:])
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    evals = [row["eval/arithmetic"] for row in rows if "eval/arithmetic" in row]
    return {
        "precision": precision,
        "seed": str(seed),
        "first": mean(row["rollout/raw_reward"] for row in rows[:5]),
        "last": mean(row["rollout/raw_reward"] for row in rows[-5:]),
        "eval": evals[-1] if evals else float("nan"),
        "mismatch": mean(row["train/train_rollout_logprob_abs_diff"] for row in rows[-5:]),
        "seconds": seconds,
        "peak_gib": usage.ru_maxrss / 2**20,
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
