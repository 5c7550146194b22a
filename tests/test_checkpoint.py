"""Checkpoint folders: atomic, verified, rotated, and clear about a full disk."""

import errno
import resource
from pathlib import Path

import pytest
import torch

from runner.errors import UserError
from runner.run import checkpoint
from runner.weights.files import write_tensors


def _writer(text: str):
    return lambda folder: (folder / "weights.bin").write_text(text)


def test_save_rotates_and_latest_is_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, {"pool": {"speculation": "on"}}, _writer(f"weights {step}"), keep=2)
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000020", "step_000030"]
    newest = checkpoint.latest(tmp_path)
    assert (newest / "trainer" / "weights.bin").read_text() == "weights 30"
    assert checkpoint.read_state(newest) == {"pool": {"speculation": "on"}, "step": 30}


def test_a_kill_while_writing_leaves_the_earlier_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {}, _writer("one"), keep=2)

    def killed(folder: Path) -> None:
        (folder / "weights.bin").write_text("half")
        raise KeyboardInterrupt  # as a kill would: no clean-up of ours runs for it

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, {}, killed, keep=2)
    assert checkpoint.latest(tmp_path).name == "step_000001"
    checkpoint.save(tmp_path, 2, {}, _writer("two"), keep=2)  # the partial folder does not stand in the way
    assert checkpoint.latest(tmp_path).name == "step_000002"


class Slow:
    """A save whose file is there when it is asked for the second time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, 0

    def finished(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def wait(self) -> None:
        (self.folder / "weights.bin").write_text("all of it")


def test_a_checkpoint_written_beside_the_run_is_published_when_it_is_complete(tmp_path: Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path, Slow, keep=2)
    checkpoints.save(1, {"seen": "then"})
    assert not checkpoint.complete(tmp_path)
    checkpoints.poll()
    assert checkpoint.read_state(checkpoint.latest(tmp_path)) == {"seen": "then", "step": 1}
    checkpoints.save(2, {})
    assert len(checkpoint.complete(tmp_path)) == 1
    checkpoints.save(3, {})  # joins the one before it
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000001", "step_000002"]
    checkpoints.join()
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000002", "step_000003"]
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {}, _writer("one"), keep=3)
    newest = checkpoint.save(tmp_path, 2, {}, _writer("two"), keep=3)
    (newest / "trainer" / "weights.bin").write_text("tw0")
    assert checkpoint.verify(newest) == ["trainer/weights.bin differs from its digest"]
    assert checkpoint.latest(tmp_path).name == "step_000001"


def test_disk_full_keeps_the_last_complete_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {}, _writer("one"), keep=1)

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="disk is full.*step_000001"):
        checkpoint.save(tmp_path, 2, {}, full, keep=1)
    assert checkpoint.latest(tmp_path).name == "step_000001"
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


def test_a_write_that_the_system_refuses_half_way_keeps_the_last_complete_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {}, _writer("one"), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refused(folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            write_tensors({"weight": torch.zeros(4096)}, folder / "weights.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(UserError, match="cannot save a checkpoint.*File too large.*step_000001"):
        checkpoint.save(tmp_path, 2, {}, refused, keep=1)
    assert checkpoint.latest(tmp_path).name == "step_000001"


def test_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.latest(tmp_path)
