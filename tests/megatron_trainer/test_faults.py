"""A rank that dies, stops or raises ends the trainer within a bounded time and says so; nothing is left running."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import UserError, UserErrors
from runner.trainer.megatron import MegatronTrainer, driver
from runner.trainer.megatron.ranks import RankFailure
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch

pytestmark = pytest.mark.megatron


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _assert_ends(trainer: MegatronTrainer, harm: Callable[[int], None], seconds: float, match: str) -> None:
    """Run steps, harm rank 1 in the middle of one, and see the whole trainer end."""
    cfg = trainer.cfg
    pids = trainer.ranks.pids
    trainer.step(batch(cfg))
    started: list[float] = []

    def strike() -> None:
        started.append(time.monotonic())
        harm(pids[1])

    timer = threading.Timer(0.2, strike)
    timer.start()
    with pytest.raises(RankFailure, match=match):
        for seed in range(10_000):
            trainer.step(batch(cfg, seed=seed))
    assert time.monotonic() - started[0] < seconds
    assert all(_gone(pid) for pid in pids)
    with pytest.raises(RankFailure, match="closed"):
        trainer.step(batch(cfg))
    trainer.close()


def test_a_killed_rank_ends_the_trainer() -> None:
    trainer = MegatronTrainer(megatron_config("moe", "dp2", format="int4"))
    _assert_ends(trainer, lambda pid: os.kill(pid, signal.SIGKILL), 60.0, r"rank 1 was killed by signal 9 during updates")


def test_a_rank_that_falls_silent_ends_the_trainer() -> None:
    """Both ranks are then silent: one is stopped, the other waits for it in a collective."""
    trainer = MegatronTrainer(megatron_config("moe", "dp2", format="int4"))
    trainer.ranks.timeout = 10.0
    _assert_ends(trainer, lambda pid: os.kill(pid, signal.SIGSTOP), 60.0, r"no answer to updates within 10 s")


def test_a_rank_that_raises_ends_the_trainer_with_its_traceback() -> None:
    trainer = MegatronTrainer(megatron_config("moe", "single", format="int4"))
    broken = batch(trainer.cfg)
    broken.advantages[0] = broken.advantages[0][:-1]
    pids = trainer.ranks.pids
    with pytest.raises(RankFailure, match=r"(?s)rank 0 failed in updates.*policy_step"):
        trainer.step(broken)
    assert all(_gone(pid) for pid in pids)


def test_sizes_that_do_not_divide_the_ranks() -> None:
    with pytest.raises(UserError, match=r"tp 2 x pp 2 x cp 1 = 4 does not divide 2 trainer processes"):
        MegatronTrainer(megatron_config("moe", "tp2_sp", **{"parallelism.pp": 2}))


def test_a_group_that_a_shard_would_cut() -> None:
    with pytest.raises(UserError, match=r"cuts a group of 64") as caught:
        MegatronTrainer(megatron_config("moe", "etp2", format="int4", **{"precision.train.group_size": 64}))
    assert caught.value.key == "precision.group_size"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = driver.find_spec
    monkeypatch.setattr(driver, "find_spec", lambda name: None if name == "psutil" else real(name))
    monkeypatch.setattr(driver, "version", lambda name: "0.15.0")
    with pytest.raises(UserErrors) as caught:
        MegatronTrainer(megatron_config())
    assert "psutil" in str(caught.value) and "megatron-core 0.15.0 is installed, 0.16.1 is needed" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("fp8_param_gather", True), ("fp8_matmul", "scaled_mm")])
def test_what_only_transformer_engine_has(key: str, value: object) -> None:
    with pytest.raises(UserError, match="on CUDA|needs CUDA") as caught:
        MegatronTrainer(megatron_config(format="fp8", **{f"precision.{key}": value}))
    assert caught.value.key == f"precision.{key}" and "simulate" in str(caught.value)


def test_ranks_die_with_the_driver() -> None:
    """Killed without a chance to clean up, the driver leaves no rank behind."""
    import subprocess
    import sys

    program = (
        "import sys, time\n"
        "from runner.trainer.megatron import MegatronTrainer\n"
        "from tests.megatron_trainer.configs import megatron_config\n"
        "trainer = MegatronTrainer(megatron_config('moe', 'dp2', format='int4'))\n"
        "print(*trainer.ranks.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    driver_process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver_process.stdout is not None
    pids = [int(word) for word in driver_process.stdout.readline().split()]
    assert len(pids) == 2
    driver_process.kill()
    driver_process.wait()
    deadline = time.monotonic() + 30
    while not all(map(_gone_or_zombie, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(_gone_or_zombie, pids))


def _gone_or_zombie(pid: int) -> bool:
    """Its new parent may take a while to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
