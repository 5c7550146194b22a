"""Every recipe is planned at its own size, and runs at laptop scale: `make test-recipes`."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from runner.config import compose, searchpath
from runner.planner.tables import show as plan
from runner.precision import formats

FILES = {file.stem: yaml.safe_load(file.read_text()) for file in searchpath.files_of("recipe") if file.stem != "none"}
SWEEPS = {name: text["hydra"]["sweeper"]["params"] for name, text in FILES.items() if "hydra" in text}
BLOCKS = ("model.num_kv_heads=4",)  # SGLang wants whole blocks of 128 rows of k and v, of which the toy twins have 64
PUBLISHED = [name for name in FILES if name not in SWEEPS]
SERVED = [name for name in PUBLISHED if name != "qwen3_vl_2b_geo3k"]  # servers are sent no images
LAPTOP = [
    "scale=laptop", "steps=2", "seed=1", "tracking=none", "trainer.threads=1", "warm_start.max_steps=20",
    "warm_start.check_interval_steps=20",
]  # fmt: skip


@pytest.mark.parametrize("recipe", FILES)
def test_a_recipe_fits_the_machines_that_it_names(recipe: str) -> None:
    out = io.StringIO()
    cfg = compose.load_config([f"recipe={recipe}"])
    assert plan(cfg, Console(file=out, width=200, color_system=None)) == 0, out.getvalue()
    assert "FITS" in out.getvalue()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs here: those of one toy model share its warm start."""
    return tmp_path_factory.mktemp("recipes")


def runs(outputs: Path, recipe: str, *overrides: str) -> list[Path]:
    """The folders that the recipe's run, or each job of its sweep, has left."""
    before = set(outputs.rglob("metrics.jsonl"))
    command = [sys.executable, "-m", "runner", f"recipe={recipe}", *LAPTOP, *overrides, f"outputs_dir={outputs}"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    return sorted(path.parent for path in set(outputs.rglob("metrics.jsonl")) - before)


def whole(run: Path) -> None:
    """Two steps were made of samples that were graded, with weights that arrived."""
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert step["train/nan_steps"] == 0 and step["sync/resident_checked"] > 0 and step["perf/rollout_tokens"] > 0
        assert math.isfinite(step["train/loss"]) and 0 <= step["rollout/raw_reward"] <= 1
    assert "sync_failed" not in (run / "events.jsonl").read_text()


@pytest.mark.night
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_runs_at_laptop_scale(outputs: Path, recipe: str) -> None:
    (run,) = runs(outputs, recipe)
    whole(run)


@pytest.mark.night
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", SWEEPS)
def test_a_sweep_runs_every_job(outputs: Path, recipe: str) -> None:
    jobs = math.prod(len(values.split(",")) for key, values in SWEEPS[recipe].items() if key != "seed")
    found = runs(outputs, recipe)
    assert len(found) == jobs > 1
    for run in found:
        whole(run)


@pytest.mark.night
@pytest.mark.sglang
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", SERVED)
def test_a_recipe_runs_at_laptop_scale_with_its_own_trainer_and_engines(outputs: Path, recipe: str) -> None:
    """Megatron ranks and SGLang servers, on this machine's CPU."""
    pytest.importorskip("sglang", reason="make setup-sglang")
    cfg = compose.load_config([f"recipe={recipe}"])
    blocks = BLOCKS if formats.spec_of(cfg.precision.rollout.format).block_rows > 1 else ()
    (run,) = runs(outputs, recipe, f"trainer={cfg.trainer.name}", f"rollout={cfg.rollout.name}", *blocks)
    whole(run)
    resolved = (run / "resolved.yaml").read_text()
    assert "MegatronTrainer" in resolved and "SglangPool" in resolved
