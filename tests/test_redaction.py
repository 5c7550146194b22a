"""Secrets are in no file of a run, and a resumed run has them all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner import redaction
from runner.config import compose
from runner.errors import UserError
from runner.run.folder import open_folder
from runner.tracking.folder import plain_config, write_resolved

URL = "cluster.address='http://me:hunter2!x@host/q?token=tok123'"


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(redaction, "_kept", {})
    monkeypatch.setattr(redaction, "_environment", {})


@pytest.mark.parametrize(
    "item",
    [
        URL,
        "model.hf_checkpoint=https://tok_abc@hub.co/m",
        "+rollout.server_args.api_key=sk-1",
        "tracking.project=a://:p@ss@h",
        "x=1",
    ],
)
def test_recorded_overrides_hold_no_secret_and_come_back(item: str) -> None:
    (kept,) = redaction.recorded([item])
    for secret in ("hunter2", "tok123", "tok_abc", "sk-1", "p@ss"):
        assert secret not in kept and secret not in redaction.shown([item])[0]
    assert redaction.restored([kept]) == [item] and redaction.recorded([item]) == [kept]


def test_names_without_secrets_stay() -> None:
    plain = [
        "cluster.address=ssh://git@host",
        "trainer.max_tokens_per_gpu=1",
        "tracking.project=${oc.env:KEY}",
        "a=http://h:80/x@y",
    ]
    assert redaction.recorded(plain) == redaction.shown(plain) == plain


def test_a_runs_folder_holds_no_secret_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "from-the-environment")
    given = [URL, "tracking.project='${oc.env:KEY}'", "tracking.entity='a ${tracking.project}'", f"outputs_dir={tmp_path}/o"]
    loaded = compose.load([*given, "run_name=r"])
    assert loaded.config.tracking.entity == "a from-the-environment"
    folder = open_folder(loaded.config, redaction.recorded(loaded.overrides))
    write_resolved(folder.path, loaded.config)
    text = "".join(file.read_text() for file in folder.path.rglob("*") if file.is_file())
    for secret in ("hunter2", "tok123", "from-the-environment"):
        assert secret not in text
    assert "a ${oc.env:KEY}" in text
    resumed = compose.load([f"resume={folder.path}"]).config
    assert resumed.cluster.address == loaded.config.cluster.address and resumed.tracking == loaded.config.tracking
    assert plain_config(resumed, secrets=True)["cluster"]["address"] == loaded.config.cluster.address
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(UserError, match="only the user who started it"):
        compose.load([f"resume={folder.path}"])
    assert compose.load([f"resume={folder.path}", "cluster.address=null"]).config.cluster.address is None


def test_kept_secrets_are_readable_by_their_user_alone(tmp_path: Path) -> None:
    redaction.recorded([URL])
    files = [file for file in (tmp_path / "state").rglob("*") if file.is_file()]
    assert len(files) == 2 and all(file.stat().st_mode & 0o077 == 0 for file in files)
