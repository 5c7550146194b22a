"""Runs in a table: `python compare.py outputs KEY [METRIC]` groups them by a key of their config; mean and spread of each group.

A notebook does the same: every line of metrics.jsonl is a dict, and `table` returns plain rows.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from runner.tracking.folder import read_metrics, run_state

LAST = 5  # steps over which a run's value is the mean


def setting(run: Path, key: str) -> str:
    """A dotted key of the config as it ran: `precision.name`, `algorithm.samples_per_prompt`."""
    value: Any = yaml.safe_load((run / "resolved.yaml").read_text())
    for part in key.split("."):
        value = value[part]
    return str(value)


def table(runs: Iterable[Path], key: str, metric: str) -> list[tuple[str, int, float, float]]:
    """(value of the key, runs, mean, sample standard deviation), of completed runs that logged the metric."""
    groups: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        values = [row[metric] for row in read_metrics(run) if metric in row]
        if values and run_state(run) == "completed":
            groups[setting(run, key)].append(statistics.mean(values[-LAST:]))
    spread = {name: statistics.stdev(found) if len(found) > 1 else float("nan") for name, found in groups.items()}
    return [(name, len(found), statistics.mean(found), spread[name]) for name, found in sorted(groups.items())]


if __name__ == "__main__":
    folder, key, metric = [*sys.argv[1:], "rollout/raw_reward"][:3]
    found = sorted(path.parent for path in Path(folder).rglob("metrics.jsonl"))
    print(f"{key:24} runs  {metric}")
    for name, count, mean, deviation in table(found, key, metric):
        print(f"{name:24} {count:4}  {mean:.4f} ± {deviation:.4f}")
