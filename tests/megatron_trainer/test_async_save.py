"""trainer.async_save: a checkpoint written beside the next steps holds the state it was begun at, or is none at all."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from runner.config.schema import Config
from runner.run import checkpoint
from runner.trainer.megatron.ranks import RankFailure
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch, exported, megatron

pytestmark = pytest.mark.megatron


def _config() -> Config:
    return megatron_config("moe", "dp2", format="int4", **{"router_replay.trainer": True, "trainer.async_save": True})


def _members(sessions: list[int]) -> list[int]:
    """Processes of these sessions that still run."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) in sessions and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_what_is_saved_is_the_state_it_was_begun_at(tmp_path: Path) -> None:
    """Two steps are made while it is written; a resume repeats them."""
    cfg = _config()
    with megatron(cfg) as trainer:
        busy = trainer.step(batch(cfg)).busy
        assert len(busy) == len(trainer.ranks.pids) and all(begin < end for begin, end in busy)
        at_save = exported(trainer, "bf16")
        saving = trainer.begin_save(tmp_path)
        expected = [trainer.step(batch(cfg, seed=seed)).metrics for seed in (1, 2)]
        deadline = time.monotonic() + 60
        while not saving.finished():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        saving.wait()
    with megatron(cfg) as resumed:
        resumed.load(tmp_path)
        assert all(torch.equal(tensor, at_save[name]) for name, tensor in exported(resumed, "bf16").items())
        assert [resumed.step(batch(cfg, seed=seed)).metrics for seed in (1, 2)] == expected


def test_a_rank_killed_while_writing_leaves_the_last_complete_checkpoint(tmp_path: Path) -> None:
    cfg = _config()
    with megatron(cfg) as trainer:
        checkpoints = checkpoint.Checkpoints(tmp_path, trainer.begin_save, keep=2)
        trainer.step(batch(cfg))
        at_save = exported(trainer, "bf16")
        checkpoints.save(1, {})
        trainer.step(batch(cfg, seed=1))
        checkpoints.save(2, {})  # joins the one before
        assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000001"]
        sessions = trainer.ranks.pids  # every rank leads one, which its writers are in
        os.kill(trainer.ranks.pids[1], signal.SIGKILL)
        with pytest.raises(RankFailure, match="rank 1 was killed by signal 9 during finish_save"):
            checkpoints.join()
    deadline = time.monotonic() + 10
    while (left := _members(sessions)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "writers outlived their rank"
    latest = checkpoint.latest(tmp_path)
    assert latest.name == "step_000001" and not checkpoint.verify(latest)
    with megatron(cfg) as resumed:
        resumed.load(latest / "trainer")
        assert all(torch.equal(tensor, at_save[name]) for name, tensor in exported(resumed, "bf16").items())
        again = checkpoint.Checkpoints(tmp_path, resumed.begin_save, keep=2)
        again.save(2, {})
        again.join()
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000001", "step_000002"]
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
