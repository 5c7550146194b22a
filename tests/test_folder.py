"""A run's folder: names that stay inside, one writer at a time, nothing of others cleared, damage named and passed over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import lock
from runner.config import compose, recorded
from runner.config.rules.names import run_name
from runner.errors import Failure, UserError
from runner.run import checkpoint, folder
from runner.tracking import folder as files
from runner.tracking.tracker import CompositeTracker, JsonlTracker, LateTracker, StatusTracker
from runner.trainer.megatron.ranks import LocalRanks
from tests.run_folders import config, made


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---- names


NAMES = [
    "..",
    ".",
    "../x",
    "a/b",
    "/abs",
    "a/../b",
    "sweep_x/..",
    "sweep_x/a/b",
    "sweep_../..",
    "a\\b",
    "a\nb",
    "a\0b",
    ".hidden",
]
NAMES += ["-m", "~", "~root", "a\u200bb", " a", "a ", " ", "x" * 256, "é" * 128, "\udc80"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_component(tmp_path: Path, name: str) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (tmp_path / "metrics.jsonl").write_text("somebody's")
    assert [error.key for error in run_name(config(outputs, name))] == ["run_name"]
    with pytest.raises(UserError, match="run_name") as caught:
        folder.open_folder(config(outputs, name), [])
    assert caught.value.fix and tree(tmp_path) == {"metrics.jsonl": b"somebody's"}


@pytest.mark.parametrize("name", ["a", "2026-01-01_x", "lr=1e-4,seed=2", "ünï 日本", "é" * 127, "sweep_seed_0123456789/seed=1"])
def test_names_that_are_allowed(tmp_path: Path, name: str) -> None:
    assert not list(run_name(config(tmp_path, name)))
    with folder.open_folder(config(tmp_path, name), []) as opened:
        assert opened.path == tmp_path / name and (tmp_path / name / "logs").is_dir()


# ---- what may be cleared


def test_a_folder_of_somebody_else_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "status.json", "checkpoints/x", "rollouts/x", ".hydra/overrides.yaml", "resolved.yaml"):
        path = tmp_path / "theirs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    (tmp_path / "sweep" / lock.NAME).touch()
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    for name in ("theirs", "sweep", "file"):
        with pytest.raises(UserError, match=f"{name} is "):
            folder.open_folder(config(tmp_path, name), [])
    assert tree(tmp_path) == before


def test_an_attempt_without_a_checkpoint_is_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    run = made(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (run / "rollouts").rmdir()
    (run / "rollouts").symlink_to(elsewhere)
    with folder.open_folder(config(tmp_path, "run"), []) as opened:
        assert "takes its place" in opened.notes[0] and not (run / "metrics.jsonl").exists()
        assert (run / "rollouts").is_dir() and not (run / "rollouts").is_symlink() and (elsewhere / "kept").exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_with_checkpoints_is_not_replaced(tmp_path: Path, damaged: bool) -> None:
    run = made(tmp_path, 3)
    if damaged:
        (run / "checkpoints" / "step_000003" / checkpoint.MANIFEST).unlink()
    before = tree(run)
    with pytest.raises(UserError, match="already holds a run with" + (" damaged" if damaged else "")):
        folder.open_folder(config(tmp_path, "run"), [])
    assert tree(run) == before


# ---- one writer

HOLD = """
import os, sys, time
from pathlib import Path
from runner.lock import Lock
lock = Lock(Path(sys.argv[1]))
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
sleeper = __import__("subprocess").Popen(["sleep", "60"], close_fds=False)
print(child, sleeper.pid, flush=True)
time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_it_though_children_live(tmp_path: Path) -> None:
    run = made(tmp_path, 1)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    children = [int(pid) for pid in holder.stdout.readline().split()]
    try:
        before = tree(run)
        for cfg in (config(tmp_path, resume=run), config(tmp_path, "run")):
            with pytest.raises(UserError, match=f"process {holder.pid} on host {os.uname().nodename}"):
                folder.open_folder(cfg, [])
        assert tree(run) == before
        found = lock.holder(run)
        assert found is not None and found.pid == holder.pid
        holder.kill()
        holder.wait()
        for child in children:
            os.kill(child, 0)  # they live
        assert lock.holder(run) is None
        folder.open_folder(config(tmp_path, resume=run), []).close()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_a_released_lock_says_nothing_of_the_machine(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert (run / lock.NAME).read_bytes() == b""
    held = lock.Lock(run)
    assert os.uname().nodename in (run / lock.NAME).read_text()
    with pytest.raises(lock.Held):
        lock.Lock(run, patience_seconds=0.0)
    held.release()
    held.release()
    lock.Lock(run).release()


def test_a_look_at_the_holder_does_not_stop_the_next_one(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.fcntl, "flock", _busy_at_first(lock.fcntl.flock))
        lock.Lock(tmp_path).release()


def _busy_at_first(real):  # type: ignore[no-untyped-def]
    calls = []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) < 3:
            raise BlockingIOError
        real(descriptor, operation)

    return flock


def test_a_killed_run_says_killed_and_a_locked_one_running(tmp_path: Path) -> None:
    run = made(tmp_path)
    files.write_status(run, "running", step=1)  # by this process, which lives, and has not locked it
    assert files.run_state(run) == "killed"
    held = lock.Lock(run)
    assert files.run_state(run) == "running"
    held.release()


# ---- resume


def test_what_a_resume_changes_is_part_of_the_run(tmp_path: Path) -> None:
    run = made(tmp_path, 1)
    with folder.open_folder(config(tmp_path, resume=run), []) as opened:
        opened.keep_overrides(["seed=1", "steps=12", f"resume={run}"])
    assert recorded.read_overrides(run) == ["seed=1", "steps=12"]
    assert compose.with_resumed([f"resume={run}", "seed=2"])[:2] == ["steps=12", "seed=2"]
    for name in (run.name, f"{run.parent.name}/{run.name}"):
        assert f"run_name={name}" in compose.with_resumed([f"resume={run}", f"run_name={name}"])
    with pytest.raises(UserError, match="goes on in its own folder"):
        compose.with_resumed([f"resume={run}", "run_name=another"])


@pytest.mark.parametrize(
    "items", [[], ["a=1"], ["task.prompt_template='{question}\\n\"x\": ü😀\\u2028'", "+x=[1,{a: b}]", "~y", "z=null", "k="]]
)
def test_overrides_round_trip(tmp_path: Path, items: list[str]) -> None:
    (tmp_path / ".hydra").mkdir()
    recorded.write_overrides(tmp_path, items)
    assert recorded.read_overrides(tmp_path) == items


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"null\n",
        b"a: 1\n",
        b"- a=1\n- [b=1]\n",
        b"\xff\xfe",
        b"- 'a=1\n",
        b"# 2 overrides\n- a=1\n",
        b"- " + b"[" * 5000,
        b"3",
    ],
)
def test_a_damaged_command_line_is_no_other_experiment(tmp_path: Path, damage: bytes) -> None:
    run = made(tmp_path, 1)
    (run / recorded.OVERRIDES).write_bytes(damage)
    with pytest.raises(UserError, match="overrides.yaml") as caught:
        compose.with_resumed([f"resume={run}"])
    assert "resolved.yaml" in str(caught.value.fix)
    (run / "resolved.yaml").touch()
    (run / recorded.OVERRIDES).unlink()
    with pytest.raises(UserError, match="overrides.yaml is missing"):
        compose.with_resumed([f"resume={run}"])


def test_hydras_own_file_is_read(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / recorded.OVERRIDES).write_text("- seed=1\n- 'x=\"é\"'\n")
    assert recorded.read_overrides(tmp_path) == ["seed=1", 'x="é"']


# ---- mid-run


@pytest.mark.parametrize("gone", ["", ".hydra/overrides.yaml", "checkpoints", "rollouts", "logs", lock.NAME])
def test_what_was_deleted_is_missed(tmp_path: Path, gone: str) -> None:
    import shutil

    with folder.open_folder(config(tmp_path, "run"), []) as opened:
        opened.check()
        path = opened.path / gone
        path.unlink() if path.is_file() else shutil.rmtree(path)
        with pytest.raises(Failure, match="deleted"):
            opened.check()


def test_a_folder_that_was_made_again_is_another_one(tmp_path: Path) -> None:
    import shutil

    with folder.open_folder(config(tmp_path, "run"), []) as mine:
        tracker = CompositeTracker([JsonlTracker(mine.path), StatusTracker(mine.path)], mine.check)
        shutil.rmtree(mine.path)
        with pytest.raises(Failure, match="deleted or replaced"):
            tracker.log(0, {})
        with pytest.raises(Failure, match="deleted or replaced"):
            tracker.finish("completed", {})
        assert not mine.path.exists()  # nor does finishing make it
        with folder.open_folder(config(tmp_path, "run"), []):
            with pytest.raises(Failure, match="deleted or replaced"):
                tracker.finish("completed", {})
            assert not (mine.path / "status.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_lines_that_were_lost_are_missed(tmp_path: Path, name: str) -> None:
    tracker = JsonlTracker(tmp_path)

    def write() -> None:
        tracker.log(0, {}) if name == "metrics.jsonl" else tracker.event("x", "y")

    write()
    write()
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(Failure, match="cut short"):
        write()
    (tmp_path / name).unlink()
    with pytest.raises(Failure, match="deleted"):
        write()


def test_a_tracker_that_was_never_opened_writes_nothing() -> None:
    tracker = LateTracker(lambda: pytest.fail("opened"))
    tracker.finish("failed", {}, "refused")
    assert not tracker.is_open


READ_ONLY = """
mount -t tmpfs none "$1" && "$2" -c "$3" "$1"
"""
WRITES = """
import os, subprocess, sys
from pathlib import Path
from runner.run import checkpoint
from runner.errors import Failure
from runner.storage import atomic_write
from runner.tracking.tracker import JsonlTracker, StatusTracker
run = Path(sys.argv[1])
lines, status = JsonlTracker(run), StatusTracker(run)
subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
for write in (
    lambda: lines.log(0, {}), lambda: lines.log_samples(0, []), lambda: lines.event("x", "y"), lambda: status.log(0, {}),
    lambda: status.finish("failed", {}), lambda: atomic_write(run / "a", ""), lambda: lines.rewind(0),
    lambda: checkpoint.save(run, 1, {}, lambda folder: None, keep=1),
):
    try:
        write()
    except Failure as error:
        assert "Read-only file system" in str(error), error
    else:
        raise AssertionError("written?")
print("refused, all")
"""


def test_a_file_system_that_turns_read_only_is_a_message(tmp_path: Path) -> None:
    command = ["unshare", "-Urm", "sh", "-c", READ_ONLY, "sh", str(tmp_path), sys.executable, WRITES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare:" in done.stderr or "permission" in done.stderr:
        pytest.skip("no mounts of one's own here")
    assert done.stdout == "refused, all\n", done.stderr


# ---- scratch folders

SCRATCH = """
import sys, time
from pathlib import Path
from runner import scratch
print(scratch.make("runner-x-", Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


def test_scratch_folders_end_with_their_process(tmp_path: Path) -> None:
    from runner import scratch

    mine = scratch.make("runner-x-", tmp_path)
    owner = subprocess.Popen([sys.executable, "-c", SCRATCH, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    theirs = Path(owner.stdout.readline().strip())
    (theirs / "socket").touch()
    again = scratch.make("runner-x-", tmp_path)
    assert theirs.is_dir() and mine.is_dir()
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 20
    while theirs.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not theirs.exists()
    abandoned = tmp_path / "runner-x-abandoned"  # its guard was killed, too
    (abandoned / "pymp-1").mkdir(parents=True)
    third = scratch.make("runner-x-", tmp_path)
    assert not abandoned.exists()
    for path in (mine, again, third):
        scratch.remove(path)
        scratch.remove(path)
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_others_go_where_a_socket_fits(tmp_path: Path) -> None:
    from runner import scratch

    short = Path("/tmp/runner-x-12345678")
    assert scratch.environment(short)["TMPDIR"] == str(short)
    assert scratch.environment(Path("/tmp") / ("x" * 80)) == {}


def test_json_of_a_lock_that_is_being_written_is_no_holder_without_a_name(tmp_path: Path) -> None:
    held = lock.Lock(tmp_path)
    for text in ("", "{", "[]", '{"pid": 1}', json.dumps({"pid": "x", "host": 1, "since": None})):
        (tmp_path / lock.NAME).write_text(text)
        assert str(lock.holder(tmp_path)) == "another process"
    held.release()


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[]", b"{}"])
def test_a_damaged_warm_start_is_refused_with_what_to_remove(tmp_path: Path, damage: bytes) -> None:
    from runner.run.warm_start import cache_key, warm_start

    class Trainer:
        def load(self, folder: Path) -> None:
            raise UserError("cannot read masters.safetensors", fix="resume from another checkpoint")

    cfg = compose.load(["model=tiny_dense", f"outputs_dir={tmp_path}"]).config
    cached = tmp_path / ".warm_start" / cache_key(cfg)
    cached.mkdir(parents=True)
    (cached / "done.json").write_bytes(damage)
    with pytest.raises(UserError, match="warm start .* is damaged") as caught:
        warm_start(cfg, Trainer(), *[None] * 3, 1, None, lambda: False)  # type: ignore[arg-type]
    assert caught.value.fix == "remove that folder: it is made again"


def test_the_ranks_of_a_run_log_into_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(LocalRanks, "_spawn", lambda self, rank: started.append(rank))
    monkeypatch.setattr(LocalRanks, "_collect", lambda self, name: [])
    cfg = compose.load_config(["trainer=megatron", "parallelism=single"])
    for run_dir in (tmp_path, None):
        ranks = LocalRanks(cfg, run_dir)
        assert (ranks.log(0).parent == tmp_path / "logs") == (run_dir is not None)
        ranks.close()
    assert started == [0, 0]


def test_a_resume_composes_where_there_is_no_torch(tmp_path: Path) -> None:
    """A run's overrides are known before anything heavy is imported, and where it cannot be."""
    made(tmp_path, 1)
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'ray', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "from runner.config import compose\n"
        "loaded = compose.load(['resume=run', 'outputs_dir=' + sys.argv[1]])\n"
        "assert loaded.config.seed == 1, loaded.overrides\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
