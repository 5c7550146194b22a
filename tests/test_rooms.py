"""Names of options stand in their rooms, and those in advice exist: tests/rooms.py."""

from __future__ import annotations

from pathlib import Path

from runner.config import searchpath
from tests import layering, rooms


def test_a_name_stands_in_its_room_or_has_a_reason() -> None:
    places = list(rooms.outside(layering.modules()))
    assert [place for place in places if rooms.allowed(place) is None] == []
    assert {rooms.allowed(place) for place in places} == set(rooms.ALLOWED), "a reason without a name"


def test_a_name_outside_is_found(tmp_path: Path) -> None:
    files = {
        "runner/planner/a.py": 'if x == "int4":\n    pass\n',
        "runner/run/b.py": '"""trainer=megatron"""\nraise UserError("no", fix="trainer=megatron")\n',
        "runner/run/c.py": 'say("with trainer=megatron")\n',
        "runner/run/d.py": "def f():\n    from runner.rollout.sglang.pool import SglangPool\n",
        "runner/rollout/sglang/pool.py": 'name = "sglang"\n',
        "runner/models/families/e.py": 'name = "qwen3"\n',
        "runner/run/f.py": 'x = "torch"\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [(place.module, place.name.name) for place in rooms.outside(layering.modules(tmp_path))]
    assert sorted(found) == [("planner.a", "int4"), ("run.c", "megatron"), ("run.d", "sglang")]


def test_every_option_that_advice_names_exists() -> None:
    options = {group: set(names) for group, names in searchpath.groups().items() if group != "run"}
    named = [(path, *each) for path in layering.modules().values() for each in rooms.advice(path) if each[1] in options]
    assert [each for each in named if each[3] not in options[each[2]]] == []
    assert len(named) > 100
