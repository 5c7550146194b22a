"""Files that transports write: what killed drivers left, damaged deltas."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.data import ExportedTensor
from runner.errors import UserError
from runner.weights import place, weight_set
from runner.weights.stream import digest
from runner.weights.transports import delta


def test_folders_of_dead_drivers_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a lock, which ends with its process; process ids of another container would look dead."""
    monkeypatch.setattr(place.tempfile, "tempdir", str(tmp_path))
    code = """
import sys, time
from runner.weights import place
place.tempfile.tempdir = sys.argv[1]
print(place.shared_memory_folder(1 << 60), flush=True)
time.sleep(60)
"""
    drivers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [Path(driver.stdout.readline().strip()) for driver in drivers if driver.stdout]
    assert all(folder.is_dir() for folder in folders)
    drivers[0].kill()
    drivers[0].wait()
    made = place.shared_memory_folder(1 << 60)  # more than shared memory has: the temporary folder
    again = place.shared_memory_folder(1 << 60)  # this process's own is locked, too
    assert made.parent == tmp_path and made.is_dir() and again.is_dir()
    assert not folders[0].exists() and folders[1].is_dir()
    drivers[1].kill()
    drivers[1].wait()


def test_a_resumed_run_writes_over_what_a_killed_one_left(tmp_path: Path) -> None:
    """Names of sets begin anew in every process; a torn write leaves a hidden folder."""
    for _ in range(2):
        writer = weight_set.WeightWriter(tmp_path / "weights", durable=True)
        kept = writer.write(0, [tensor("a", 1.0)], None)
        assert writer.write(1, [tensor("a", 2.0)], None).version == 1 and kept.folder.is_dir()
        (tmp_path / "weights" / ".v000003").mkdir()  # killed here: nothing is closed
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [".v000003", "v000001", "v000002"]


def tensor(name: str, value: float) -> ExportedTensor:
    return ExportedTensor(name, "bf16", {name: torch.full((64, 8), value)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-3]), "weights-00000.safetensors"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])), "a/"),
        (lambda file: file.unlink(), "weights-00000.safetensors"),
    ],
)
def test_a_damaged_delta_is_named_and_not_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], message: str
) -> None:
    writer = delta.DeltaWriter(tmp_path / "disk", tmp_path / "local")
    base = writer.write(0, [tensor("a", 1.0)], None)
    real = writer._deltas.write

    def write(*given: Any) -> weight_set.WeightSet:
        written = real(*given)
        damage(written.files[0])
        return written

    monkeypatch.setattr(writer._deltas, "write", write)
    changed = tensor("a", 1.0)
    changed.parts["a"][3, 3] = 5.0
    with pytest.raises(UserError, match=f"(?s)the delta of version 1 is damaged on its disk.*{message}"):
        writer.write(1, [changed], base)
    assert [path.name for path in (tmp_path / "local").iterdir()] == [base.folder.name]


def test_a_delta_over_a_wrong_base_does_not_have_the_trainers_hash(tmp_path: Path) -> None:
    """So the engines refuse it when it arrives."""
    writer = delta.DeltaWriter(tmp_path / "disk", tmp_path / "local")
    base = writer.write(0, [tensor("a", 1.0)], None)
    file = base.files[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    real = delta.difference
    changed = tensor("a", 1.0)
    changed.parts["a"][3, 3] = 5.0

    def as_if_intact(name: str, new: torch.Tensor, previous: Any) -> dict[str, torch.Tensor]:
        found = real(name, new, previous)
        index = found[f"{name}/index"]
        keep = index == 3 * 8 + 3
        return {f"{name}/index": index[keep], f"{name}/value": found[f"{name}/value"][keep]}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(delta, "difference", as_if_intact)
        after = writer.write(1, [changed], base)
    ((_, arrived),) = weight_set.read_parts(after, ["a"])
    assert digest(arrived) != after.digests["a"] == digest(changed.parts["a"])


def test_parts_leave_the_device_once_through_one_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that count as a device's: one copy of each, into memory that every bucket takes again; one open per file."""
    copies: list[int] = []
    opened: list[Path] = []
    real_host, real_open = weight_set.Stage.host, weight_set.safe_open

    def host(self: weight_set.Stage, part: torch.Tensor) -> torch.Tensor:
        copy = real_host(self, part)
        copies.append(copy.data_ptr())
        return copy

    def open_file(path: Path, framework: str) -> Any:
        opened.append(path)
        return real_open(path, framework=framework)

    monkeypatch.setattr(weight_set, "on_device", lambda part: True)
    monkeypatch.setattr(weight_set.Stage, "host", host)
    monkeypatch.setattr(weight_set, "safe_open", open_file)
    writer = weight_set.WeightWriter(tmp_path / "weights", durable=False, bucket_bytes=256)
    generator = torch.Generator().manual_seed(0)
    values = {f"w{i}": torch.randint(-8, 8, (8, 3 + i), generator=generator, dtype=torch.int32) for i in range(4)}
    values["large"] = torch.ones(100, dtype=torch.int32)  # more than a bucket: memory of its own
    items = [ExportedTensor(name, "int4", {f"{name}_packed": value.t()}) for name, value in values.items()]
    first = writer.write(0, iter(items), None)
    assert len(first.files) == 2 and len(copies) == len(values) > len(set(copies))
    for name, value in values.items():
        assert first.digests[f"{name}_packed"] == digest(value.t())
        ((_, stored),) = weight_set.read_parts(first, [f"{name}_packed"])
        assert torch.equal(stored, value.t())
    opened.clear()
    second = writer.write(1, iter(items), first)
    assert sorted(opened) == sorted(first.files) and second.changes.integers[0] == 0 < second.changes.integers[1]
    writer.close()
