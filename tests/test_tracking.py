"""Tracking: JSONL that survives kills and resumes, status, redaction, console, wandb offline."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from runner import storage
from runner.config import schema
from runner.errors import UserError
from runner.rollout.sglang.config import SglangRolloutConfig
from runner.tracking import console, folder
from runner.tracking.tracker import CompositeTracker, JsonlTracker, StatusTracker, build_tracker
from runner.trainer.megatron.config import MegatronTrainerConfig
from tests.configs import composed


def tracking_config() -> schema.Config:
    return composed("tracking=none", steps=4)


# ---- metrics.jsonl


def test_metrics_round_trip_bit_for_bit(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    values = {"a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": -1e-300}
    tracker.log(0, values)
    tracker.log(0, {"eval/x": 0.5})
    tracker.log(1, {"a": 1.0})
    first, second = folder.read_metrics(tmp_path)
    assert first["a"] == 0.1 + 0.2 and math.isnan(first["b"]) and first["c"] == math.inf and first["d"] == -1e-300
    assert first["eval/x"] == 0.5 and second == {"step": 1.0, "a": 1.0}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_resume_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for step in range(5):
        tracker.log(step, {"a": float(step)})
        tracker.log_samples(step, [{"prompt": "é"}])
    tracker.event("watch", "kept as history", {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "a"')  # killed while writing
    resumed = JsonlTracker(tmp_path, first_step=3, resumed=True)
    resumed.log(3, {"a": 30.0})
    resumed.event("watch", "second", {})
    assert [(row["step"], row["a"]) for row in folder.read_metrics(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [f"step_{i}.jsonl" for i in range(3)]
    events = folder.read_jsonl(tmp_path / "events.jsonl")
    assert [(row["attempt"], row["message"]) for row in events] == [(1, "kept as history"), (2, "second")]


def test_rewinding_within_an_attempt(tmp_path: Path) -> None:
    """A trainer that was lost: the same process goes back to a checkpoint."""
    live = console.LiveConsole(tmp_path, 12, 0, Console(file=io.StringIO(), force_terminal=True, width=100))
    tracker = CompositeTracker([JsonlTracker(tmp_path), StatusTracker(tmp_path), live])
    for step in range(5):
        tracker.log(step, {"rollout/raw_reward": float(step)})
    tracker.rewind(3)
    tracker.event("trainer_restart", "again", {})
    assert [row["step"] for row in folder.read_metrics(tmp_path)] == [0, 1, 2]
    assert list(live.rewards) == [step for step, _ in live.rows] == [0, 1, 2]
    status = folder.read_status(tmp_path)
    assert status is not None and status["step"] == 3 and status["attempt"] == 1
    (event,) = folder.read_jsonl(tmp_path / "events.jsonl")
    assert (event["attempt"], event["step"]) == (1, 3)
    tracker.finish("completed", {})


def test_damage_in_the_middle_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        folder.read_metrics(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        tracker.log(0, {"a": 1.0})


# ---- status, environment, secrets


def test_status_adds_up_attempts_and_knows_a_killed_run(tmp_path: Path) -> None:
    script = (
        "import os,sys,time; from pathlib import Path; from runner.tracking.tracker import StatusTracker;"
        "t=StatusTracker(Path(sys.argv[1])); time.sleep(.1); t.log(0,{}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    before = folder.read_status(tmp_path)
    assert before is not None and before["state"] == "running" and folder.run_state(tmp_path) == "killed"
    tracker = StatusTracker(tmp_path, first_step=1)
    assert folder.run_state(tmp_path) == "running"
    tracker.finish("completed", {"reward": 0.5}, "done")
    after = folder.read_status(tmp_path)
    assert after is not None
    assert (after["state"], after["attempt"], after["step"], after["started"]) == ("completed", 2, 1, before["started"])
    assert after["active_seconds"] >= before["active_seconds"] >= 0.1
    with pytest.raises(ValueError):
        folder.write_status(tmp_path, "done", step=1)


def test_secrets_never_reach_a_file(tmp_path: Path) -> None:
    cfg = tracking_config()
    cfg.rollout = SglangRolloutConfig(
        server_args={"api_key": "sk-1", "hf_token": "hf-2", "url": "http://me:pw3@host/x", "tokenizer_path": "t"}
    )
    cfg.trainer = MegatronTrainerConfig(moe_token_dispatcher="alltoall", max_tokens_per_gpu=8)
    folder.write_resolved(tmp_path, cfg)
    text = (tmp_path / "resolved.yaml").read_text()
    assert not any(secret in text for secret in ("sk-1", "hf-2", "pw3"))
    assert "moe_token_dispatcher: alltoall" in text and "max_tokens_per_gpu: 8" in text and "tokenizer_path: t" in text


def test_environment_says_what_a_result_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "value-of-a-secret")
    folder.write_environment(tmp_path, tracking_config())
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["cpu_bf16_matmul"]["way"] in ("native", "widened") and found["cpu_bf16_matmul"]["reason"]
    assert found["packages"]["torch"] and found["cpu_cores"] >= 1 and found["memory_gib"] > 0
    if shutil.which("git") and (Path(__file__).parent.parent / ".git").exists():
        assert len(found["git"]["commit"]) == 40
    assert os.uname().nodename not in text and "value-of-a-secret" not in text


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    storage.atomic_write(path, "old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError):
        storage.atomic_write(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ---- console


@pytest.mark.parametrize(
    ("tty", "environ", "live"),
    [
        (True, {"TERM": "xterm"}, True),
        (False, {"TERM": "xterm"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {}, False),
        (True, {"TERM": "xterm", "CI": "1"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
    ],
)
def test_live_table_only_on_a_terminal(tty: bool, environ: dict[str, str], live: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return tty

    assert console.wants_live_table(Stream(), environ) is live


METRICS = {"rollout/raw_reward": 0.25, "train/grad_norm": 1.5, "eval/arithmetic": 0.75, "perf/step_time": 2.0}


def test_plain_console_is_one_line_per_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    plain = console.PlainConsole(tmp_path, 12, stream)
    with plain.progress("warm start", 2) as progress:
        progress.advance(2, "loss 0.1")
    plain.log(0, METRICS)
    plain.event("warning", "careful")
    plain.finish("completed", {"seconds": 3.0})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("warm start: 2/2") and lines[0].endswith("loss 0.1")
    assert lines[1] == "step  1/12  reward 0.250  grad norm 1.500  step s 2.00  eval/arithmetic 0.750"
    assert lines[2] == "[warning] careful" and lines[3] == "completed" and "report.html" in lines[-1]
    assert "\x1b" not in stream.getvalue()


def test_live_console_draws_table_curve_and_bars(tmp_path: Path) -> None:
    stream = io.StringIO()
    live = console.LiveConsole(tmp_path, 12, 0, Console(file=stream, force_terminal=True, width=100))
    with live.progress("warm start", 2) as progress:
        progress.advance(1, "loss 0.1")
    for step in range(10):
        live.log(step, METRICS | {"rollout/raw_reward": step / 10})
    live.event("warning", "[not markup]")
    live.finish("completed", {})
    shown = stream.getvalue()
    assert "grad norm" in shown and "0.900" in shown and "[not markup]" in shown and "10/12" in shown and "▁" in shown


def test_sparkline_spans_lowest_to_highest() -> None:
    assert console.sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert console.sparkline([1.0, 1.0], 10) == "▁▁" and console.sparkline([], 5) == ""
    assert len(console.sparkline([float(i) for i in range(1000)], 40)) == 40


# ---- together


def test_a_failing_tracker_does_not_keep_the_others_open(tmp_path: Path) -> None:
    class Failing(JsonlTracker):
        def finish(self, status: str, summary: dict[str, float], message: str = "") -> None:
            raise UserError("full")

    tracker = CompositeTracker([Failing(tmp_path), StatusTracker(tmp_path)])
    with pytest.raises(UserError, match="full"):
        tracker.finish("failed", {}, "why")
    assert folder.run_state(tmp_path) == "failed"


def test_no_wandb_import_when_disabled(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.configs import composed;"
        "from runner.tracking.tracker import build_tracker; t=build_tracker(composed('tracking=none'), Path(sys.argv[1]));"
        "t.log(0,{'a':1.0}); t.finish('completed',{}); print('wandb' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    assert {"metrics.jsonl", "status.json", "environment.json", "resolved.yaml", "report.html"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_wandb_offline_keeps_its_id_over_a_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = composed("tracking=wandb", steps=4)
    tracker = build_tracker(cfg, tmp_path)
    tracker.log(0, {"rollout/raw_reward": 0.5})
    tracker.finish("interrupted", {"reward": 0.5})
    out, err = capfd.readouterr()
    assert "wandb sync" in out and "Run history" not in out + err  # its own console summary is off
    cfg.resume = str(tmp_path)
    tracker = build_tracker(cfg, tmp_path, first_step=1)
    tracker.log(1, {"rollout/raw_reward": 0.6})
    tracker.finish("completed", {})
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb_id").read_text().strip()
    assert len({path.parent for path in files}) == 2 and {path.name for path in files} == {f"run-{run_id}.wandb"}
    assert all(path.stat().st_size > 0 for path in files)
