"""tracking=tensorboard and tracking=mlflow: what was logged, read back by each library's own reader."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.config import compose, preflight
from runner.config.schema import Config
from runner.errors import Failure, UserError, UserErrors
from runner.tracking.mlflow_tracker import name_of
from runner.tracking.tracker import build_tracker
from tests.configs import composed

METRICS = {"rollout/raw_reward": 0.25, "train/grad_norm": 1.5, "eval/arithmetic_pass@4": 0.75}


def config(name: str, folder: Path, resume: Path | None = None) -> Config:
    cfg = composed(
        f"tracking={name}", steps=4, outputs_dir=str(folder), **{"tracking.tags": ["a tag"], "tracking.group": "sweep 1"}
    )
    cfg.resume = str(resume) if resume else None
    return cfg


def two_attempts(name: str, folder: Path) -> Path:
    """A run of three steps, killed after them and resumed at the second; the run's folder."""
    run_dir = folder / "a run"
    killed = build_tracker(config(name, folder), run_dir)
    for step in range(3):
        killed.log(step, {**METRICS, "train/loss": float(step)})
    killed.event("watch", "the reward fell")
    resumed = build_tracker(config(name, folder, run_dir), run_dir, first_step=1)
    for step in (1, 2):
        resumed.log(step, {"train/loss": 10.0 * step})
    resumed.rewind(2)
    resumed.log(2, {"train/loss": math.inf})
    resumed.log(3, {"train/loss": math.nan})
    resumed.finish("stopped", {}, "by a rule")
    return run_dir


def test_tensorboard_shows_each_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="make setup")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = two_attempts("tensorboard", tmp_path)
    assert f"tensorboard --logdir '{run_dir}/tensorboard'" in capsys.readouterr().out
    found = EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {*METRICS, "train/loss"}
    assert [(row.step, row.value) for row in found.Scalars("eval/arithmetic_pass@4")] == [(0, 0.75)]
    rows = found.Scalars("train/loss")
    assert [row.step for row in rows] == [0, 1, 2, 3]
    assert [row.value for row in rows[:3]] == [0, 10, math.inf] and math.isnan(rows[3].value)
    texts = {tag: found.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode() for tag in ("config", "status")}
    assert texts["status"] == "stopped by a rule" and "group_size: 32" in texts["config"]


@pytest.mark.slow  # MLflow makes the tables of its store: seconds
def test_mlflow_keeps_the_run_over_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(module, reason="make setup")
    run_dir = two_attempts("mlflow", tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("runner")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (run_dir / "mlflow_run_id").read_text().strip() and run.info.run_name == "a run"
    assert run.info.run_id in capsys.readouterr().out
    assert run.info.status == "FINISHED" and run.data.tags["status"] == "stopped by a rule"
    assert run.data.tags["group"] == "sweep 1" and "a tag" in run.data.tags
    assert run.data.tags["event/watch"] == "the reward fell" and run.data.params["precision.group_size"] == "32"
    last: dict[int, Any] = {row.step: row.value for row in client.get_metric_history(run.info.run_id, "train/loss")}
    assert last[0] == 0 and last[1] == 10 and last[2] == sys.float_info.max and math.isnan(last[3])  # its store knows no infinity
    assert run.data.metrics["eval/arithmetic_pass_at_4"] == 0.75 and run.data.metrics["train/grad_norm"] == 1.5
    (run_dir / "mlflow_run_id").write_text("of another store")
    build_tracker(config("mlflow", tmp_path, run_dir), run_dir, first_step=4).finish("failed", {}, "failed")
    found = {entry.info.status: entry.data for entry in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"FINISHED", "FAILED"} and found["FAILED"].tags["status"] == "failed"
    assert found["FAILED"].params["precision.group_size"] == "32"  # new to this store, though the run is resumed
    refused = build_tracker(config("mlflow", tmp_path), tmp_path / "deleted")
    client.delete_run((tmp_path / "deleted" / "mlflow_run_id").read_text().strip())
    with pytest.raises(Failure, match="MLflow takes no more of the run(?s:.)*tracking=none"):
        refused.log(0, METRICS)
    cfg = config("mlflow", tmp_path)
    cfg.tracking.uri = f"file://{tmp_path}/mlruns"
    with pytest.raises(UserError, match="MLflow does not open file://"):
        build_tracker(cfg, tmp_path / "other")


def test_names_that_mlflow_does_not_take() -> None:
    assert name_of("train/grad_norm") == "train/grad_norm" and name_of("eval/x_pass@4") == "eval/x_pass_at_4"
    assert name_of("reward/(a)") == "reward/_a_"


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow"), ("mlflow", "alembic")])
def test_what_is_not_installed_is_said_before_the_run(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "installed", lambda wanted: wanted != module)
    with pytest.raises(UserErrors, match=f"tracking={name} needs {module}(?s:.)*pip install {module}"):
        preflight.check(composed(f"tracking={name}"))


def test_keys_belong_to_their_tracker_and_composing_imports_none() -> None:
    with pytest.raises(UserErrors, match="wandb_mode"):
        compose.load(["tracking=mlflow", "tracking.wandb_mode=offline"])
    names = "{'mlflow', 'tensorboard', 'wandb', 'torch'}"
    code = "import sys; from runner.config import compose; compose.load(['tracking=mlflow']);"
    code += f"sys.exit(str({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
