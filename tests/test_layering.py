"""Which room may import which: tests/layering.py."""

from __future__ import annotations

from pathlib import Path

from tests import layering


def test_every_room_has_a_floor_and_arrows_run_down_or_have_a_reason() -> None:
    known = layering.modules()
    rooms = {layering.room_of(module, known) for module in known} - {""}
    assert rooms == set(layering.GROUND) | set(layering.FLOORS)
    assert set(layering.back(layering.arrows(known))) == set(layering.BACK)


def test_no_module_is_imported_by_what_it_imports() -> None:
    assert layering.circles(layering.modules()) == []


def test_a_new_arrow_and_a_circle_are_found(tmp_path: Path) -> None:
    files = {
        "config/a.py": "from runner.run import b",
        "run/b.py": "def f():\n    from runner.config import a\n",
        "run/c.py": "import runner.run.d",
        "run/d.py": "from runner.run.c import x",
    }
    for name, text in files.items():
        (tmp_path / "runner" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runner" / name).write_text(text)
    known = layering.modules(tmp_path)
    assert set(layering.back(layering.arrows(known))) == {("config", "run")}
    assert layering.circles(known) == [["runner.run.c", "runner.run.d"]]
