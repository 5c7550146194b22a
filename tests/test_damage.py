"""Damaged files of a run: passed over, kept aside and named; a resume starts at the newest intact checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner import lock
from runner.errors import UserError
from runner.run import checkpoint, folder
from runner.tracking import folder as files
from runner.tracking.tracker import JsonlTracker, StatusTracker
from tests.run_folders import config, made

DAMAGE = [
    b"",
    b"\xff\xfe\x00",
    b"[]",
    b"{}",
    b"null",
    b'{"files": {}}',
    b'{"files": []}',
    b'{"files": {"a": 1}}',
    b'{"files": 3}',
]
DAMAGE += [
    b'{"files": {"state.json": {"bytes": "x"}}}',
    b'{"files": {"state.json": {"bytes": 1e999, "xxh3_64": ""}}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_manifest_falls_back_and_says_so(tmp_path: Path, damage: bytes) -> None:
    run = made(tmp_path, 2, 4)
    manifest = run / "checkpoints" / "step_000004" / checkpoint.MANIFEST
    manifest.write_bytes(damage)
    with folder.open_folder(config(tmp_path, resume=run), []) as opened:
        assert opened.resumed_from is not None and opened.resumed_from.name == "step_000002"
        assert (
            "step_000004: manifest.json is damaged" in opened.notes[0] and "step_000002 is the newest intact" in opened.notes[0]
        )
    (run / "checkpoints" / "step_000002" / checkpoint.MANIFEST).write_bytes(damage)
    with pytest.raises(UserError, match="only damaged ones"):
        folder.open_folder(config(tmp_path, resume=run), [])
    manifest.unlink()
    with pytest.raises(UserError, match="only damaged ones"):
        folder.open_folder(config(tmp_path, resume=run), [])
    assert lock.holder(run) is None


def test_stray_things_among_checkpoints_are_left_alone(tmp_path: Path) -> None:
    run = made(tmp_path, 2, 1_000_000, 999_999)
    for name in ("step_abc", "step_000003.bak", "step_", "old"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / checkpoint.MANIFEST).write_text("{}")
    (run / "checkpoints" / "step_000009").write_text("a file")
    assert [checkpoint.step_of(path) for path in checkpoint.complete(run)] == [2, 999_999, 1_000_000]
    assert checkpoint.latest(run).name == "step_1000000"


def test_a_damaged_checkpoint_neither_counts_as_kept_nor_is_written_over(tmp_path: Path) -> None:
    """keep=1: without it, saving step 3 would remove the intact step 2 and keep the damaged step 4."""
    run = made(tmp_path, 2, 4)
    (run / "checkpoints" / "step_000004" / "trainer" / "weights").write_bytes(b"?")
    checkpoint.set_aside(run, after=checkpoint.latest(run, warn=lambda text: None))
    checkpoint.save(run, 3, {}, lambda place: None, keep=1)
    assert checkpoint.latest(run).name == "step_000003"
    checkpoint.save(run, 4, {}, lambda place: None, keep=2)
    assert [path.name for path in checkpoint.complete(run)] == ["step_000003", "step_000004"]
    (aside,) = (run / "checkpoints").glob("damaged_step_000004*")
    assert (aside / "trainer" / "weights").read_bytes() == b"?"


BAD_LINES = [
    b"\xff\xfe",
    b'{"a": 1}',
    b"[]",
    b"3",
    b"{",
    b'{"step": "x"}',
    b'{"step": 1e999}',
    b'{"step": null}',
    b'{"step": -1}',
]
BAD_LINES += [b'{"step": true}', b'{"step": 1, "a": []}', b'{"step": 1, "a": "x"}', b"[" * 100_000]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_damaged_lines_are_left_out_of_a_resume_and_kept_aside(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "rollouts").mkdir()
    for name in ("step_x.jsonl", "step_.jsonl", "step_-1.jsonl", "notes", "step_7.jsonl", "step_0.jsonl"):
        (tmp_path / "rollouts" / name).touch()
    text = b'{"step": 0, "a": 1}\n' + bad + b'\n{"step": 2, "a": 1}\n'
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match="line 2"):
        files.read_metrics(tmp_path)
    tracker = JsonlTracker(tmp_path, first_step=2, resumed=True)
    tracker.log(2, {"a": 3.0})
    tracker.event("warning", "x")
    assert [row["step"] for row in files.read_metrics(tmp_path)] == [0, 2]
    notes = " ".join(tracker.notes)
    assert (
        "metrics.jsonl: line 2 is damaged" in notes and "events.jsonl: line" in notes and "no line of 1 of the 2 steps" in notes
    )
    assert [path.read_bytes() for path in tmp_path.glob("metrics.jsonl.damaged_*")] == [text]
    left = {path.name for path in (tmp_path / "rollouts").iterdir()}
    assert left == {"step_x.jsonl", "step_.jsonl", "step_-1.jsonl", "notes", "step_0.jsonl"}


@pytest.mark.parametrize("data", [b"{}", b'{"step": 1}', b'{"step": "x", "decision": {}}', b'{"step": 1, "decision": 3}'])
def test_a_decision_that_is_not_whole_is_damage(tmp_path: Path, data: bytes) -> None:
    row = b'{"attempt": 1, "step": 1, "kind": "pool_decision", "message": "", "data": ' + data + b"}\n"
    (tmp_path / "events.jsonl").write_bytes(row)
    assert any("it has no decision" in note for note in JsonlTracker(tmp_path, 1, resumed=True).notes)


@pytest.mark.parametrize(
    "damage", [b"", b"\xff", b"[]", b"null", b"{}", b'{"state": "running"}', b'{"state": 3', b"[" * 100_000, b'"running"']
)
def test_a_damaged_status_is_unknown_and_written_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "status.json").write_bytes(damage)
    assert files.run_state(tmp_path) == "unknown"
    with pytest.raises(UserError, match=r"status\.json"):
        files.read_status(tmp_path)
    tracker = StatusTracker(tmp_path, 1)
    assert "written anew" in tracker.notes[0]
    tracker.finish("completed", {})
    assert files.run_state(tmp_path) == "completed"


def test_a_report_of_a_damaged_folder_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from runner.__main__ import main

    JsonlTracker(tmp_path).log(0, {"a": 1.0})
    (tmp_path / "status.json").write_bytes(b"")
    (tmp_path / "rollouts" / "step_x.jsonl").touch()
    assert main(["report", str(tmp_path)]) == 0 and "unknown" in (tmp_path / "report.html").read_text()
    for name in ("resolved.yaml", "environment.json", "events.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\n")
        assert main(["report", str(tmp_path)]) == 2 and name in capsys.readouterr().err
        (tmp_path / name).unlink()
