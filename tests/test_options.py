"""An option brings its own door: one from a temporary folder is composed, planned, checked and refused like the others."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.config import compose, preflight, rules, searchpath
from runner.config import option as options
from runner.doctor.machine import optional_parts
from runner.errors import UserErrors
from runner.planner.memory import CPU_PROCESS, plan_memory
from runner.planner.parameters import take_inventory
from runner.planner.traffic import sync_flows

ENGINE = """
from dataclasses import dataclass

from runner.config.limits import number
from runner.config.option import EngineLayout, Need, Option
from runner.config.schema import RolloutConfig


@dataclass
class ToyRolloutConfig(RolloutConfig):
    toys: int = number(ge=1, le=8)


def layout(cfg):
    return EngineLayout(engines=cfg.rollout.toys, ranks=2, ranks_key="rollout.toys", on_gpu=False)


OPTION = Option(
    ToyRolloutConfig,
    needs=(Need("toy-engine", "no_such_toy_engine", "the toys need toy-engine, which is not installed", "pip install toys"),),
    engines=layout,
)
"""
ENGINE_YAML = """
defaults: [toy_schema@_here_, /shared/sampling@sampling, _self_]
_target_: runner.rollout.toy.ToyPool
name: toy
request_timeout_seconds: 60
toys: 3
"""

Add = Callable[[str, str, str, str], None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """(package, file inside it, its text, conf file with its text after a newline): a room and its option, for one test."""
    conf = tmp_path / "conf"
    conf.mkdir()
    monkeypatch.setenv(searchpath.VARIABLE, str(tmp_path))
    made: list[str] = []

    def added(package: str, module: str, text: str, option: str) -> None:
        home = importlib.import_module(package)
        folder = tmp_path / package
        (folder / module).parent.mkdir(parents=True, exist_ok=True)
        (folder / module).write_text(text)
        monkeypatch.setattr(home, "__path__", [*home.__path__, str(folder)])
        importlib.invalidate_caches()
        name, _, body = option.partition("\n")
        (conf / name).parent.mkdir(exist_ok=True)
        (conf / name).write_text(body)
        made.append(f"{package}.toy")

    yield added
    for name in list(sys.modules):
        if name in made or name.startswith(tuple(f"{one}." for one in made)):
            del sys.modules[name]


def test_an_engine_with_a_layout_and_a_need_of_its_own_is_its_folder_and_one_file(add: Add) -> None:
    add("runner.rollout", "toy/option.py", ENGINE, "rollout/toy.yaml" + ENGINE_YAML)
    cfg = compose.load_config(["rollout=toy"])
    assert rules.check(cfg) == [] and options.engine_layout(cfg).engines == 3
    inventory = take_inventory(cfg)
    (run,) = plan_memory(cfg, inventory).phases
    assert run.items["processes"] == (1 + 3 * 2) * CPU_PROCESS, "the trainer, and three engines of two ranks"
    assert any("3 engines" in flow.how for flow in sync_flows(cfg, inventory))
    with pytest.raises(UserErrors, match="rollout=toy: the toys need toy-engine.*(?s:.)*pip install toys"):
        preflight.check(cfg)
    (part,) = [row for row in optional_parts(cfg) if row.name == "toy-engine"]
    assert part.status.name == "fail"
    with pytest.raises(UserErrors, match="rollout.toys"):  # the key that decides the ranks is the engine's own
        compose.load(["rollout=toy", "model.num_heads=1", "model.num_kv_heads=1"])


def test_every_option_of_conf_with_a_target_has_a_door() -> None:
    there = {str(choice) for choice in options.choices()}
    files = {f"{group}={file.stem}" for group in options.groups() for file in (searchpath.CONFIG_DIR / group).glob("*.yaml")}
    assert there == files and {"trainer=torch", "rollout=sglang", "task=gsm8k"} <= there
    for choice in options.choices():
        assert (choice.option.engines is not None) == (choice.group == "rollout")
        assert (choice.option.trainer is not None) == (choice.group == "trainer")
