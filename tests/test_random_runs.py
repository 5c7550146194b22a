"""Whatever keys are set to within their types: the program runs one step, or names what is wrong and exits with 2."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import pytest

from runner.config import compose, limits

RUNS = 24
SMALL = [
    "steps=1", "warm_start.enabled=false", "algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=2",
    "evaluation.num_prompts=2", "evaluation.samples_per_prompt=1", "evaluation.interval_steps=1",
    "rollout.sampling.max_response_tokens=16", "tracking=none", "trainer.threads=1", "mismatch.probe_sequences=1",
]  # fmt: skip
CHOICES = {
    "model": ["tiny_dense", "tiny_moe", "tiny_mla", "tiny_vlm", "tiny_mtp"],
    "precision": ["bf16", "fp8", "fp8_rollout", "int4_qat", "int4_rollout", "int4_train", "mxfp4_qat", "nvfp4_qat"],
    "algorithm": ["grpo", "gspo", "cispo", "reinforce_pp"],
}
# machines and architectures are other tests' subject; these would only make a run long
LEFT_OUT = ("model.", "watch.", "cluster.", "parallelism.", "steps")


def draw(source: random.Random, kind: Any, allowed: Any) -> str | None:
    """A value of this type as it is typed: small ones, and the ends of its range."""
    if type(None) in get_args(kind):
        if source.random() < 0.3:
            return "null"
        kind = next(item for item in get_args(kind) if item is not type(None))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return str(source.choice(list(kind)).value)
    ends = [end for name in ("ge", "gt", "le", "lt") if (end := getattr(allowed, name, None)) is not None]
    if kind is bool:
        return source.choice(["true", "false"])
    if kind is int:
        return str(source.choice([0, 1, 2, 3, 5, 7, 16, 31, 64, 100, *map(int, ends)]))
    if kind is float:
        return repr(source.choice([0.0, 1e-30, 1e-9, 0.1, 0.5, 0.9, 1.0, 1.5, 2.0, 10.0, *map(float, ends)]))
    return None


def overrides(seed: int) -> list[str]:
    source = random.Random(seed)
    chosen = [*SMALL, *(f"{group}={source.choice(options)}" for group, options in CHOICES.items())]
    cfg = compose.load(chosen, check_rules=False).config
    keys = [item for item in limits.walk(cfg) if not item[0].startswith(LEFT_OUT)]
    for key, holder, field in source.sample(keys, source.choice([1, 2, 3])):
        value = draw(source, limits.typed_keys(type(holder))[field.name], field.metadata.get(limits.RANGE))
        chosen += [f"{key}={value}"] if value is not None else []
    return chosen


@pytest.mark.night
@pytest.mark.parametrize("seed", range(RUNS))
def test_a_run_or_a_problem_with_its_key(tmp_path: Path, seed: int) -> None:
    chosen = overrides(seed)
    command = [sys.executable, "-m", "runner", *chosen, f"outputs_dir={tmp_path}", "run_name=random"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    told = f"{chosen}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, told
    if done.returncode == 2:
        assert "fix:" in done.stderr, told
    else:
        assert len((tmp_path / "random" / "metrics.jsonl").read_text().splitlines()) == 1
