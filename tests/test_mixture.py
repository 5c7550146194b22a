"""Several data sets by weight: exact shares in every stretch, every set's own epochs, and a place that counts problems."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config import compose, recorded
from runner.errors import UserError, UserErrors
from runner.tasks.gsm8k import Gsm8kTask
from runner.tasks.jsonl import ColumnsConfig, SetConfig
from runner.tasks.mixture import Mixture, shares
from tests.answers import TOKENIZER
from tests.test_tasks import jsonl_config, write

SIZES = {"a": 7, "b": 30, "c": 2}


def mixed(weights: tuple[float, ...] = (3, 1, 0.5)) -> Mixture:
    return Mixture(SIZES, weights, "task", 5)


def test_weights_become_whole_numbers_as_they_are_written() -> None:
    assert shares([0.7, 0.3]) == [7, 3] and shares([1, 1, 1]) == [1, 1, 1] and shares([0.125, 1]) == [1, 8]
    assert shares([2.5e-2, 1e-2]) == [5, 2] and shares([6, 4.0]) == [3, 2]
    with pytest.raises(ValueError, match="repeat after"):
        shares([1 / 3, 1])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 400), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_every_stretch_holds_the_shares_to_within_a_problem_or_two(weights: list[int], start: int, length: int) -> None:
    sizes = {str(index): 3 for index in range(len(weights))}
    mixture = Mixture(sizes, weights, "task", 0)
    before, after = mixture.drawn(start), mixture.drawn(start + length)
    counted = Counter(mixture.set_of(mixture.at(position)) for position in range(start, start + length))
    for name, weight in zip(sizes, weights, strict=True):
        assert after[name] - before[name] == counted[name]
        assert abs(counted[name] - length * weight / sum(weights)) <= len(weights)


def test_each_set_walks_through_permutations_of_its_own() -> None:
    mixture = mixed()
    order = [mixture.at(position) for position in range(9 * 28)]
    assert order == [mixed().at(position) for position in range(9 * 28)]
    for name, first, size in (("a", 0, 7), ("b", 7, 30), ("c", 37, 2)):
        own = [problem for problem in order if mixture.set_of(problem) == name]
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert epochs and all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs), name
        assert len({tuple(epoch) for epoch in epochs}) > 1 or len(epochs) == 1, "epochs are shuffled anew"


def test_one_set_is_drawn_as_it_always_was() -> None:
    """Positions of runs that began before there were mixtures."""
    from runner.tasks.seeding import stream

    one = Mixture({"": 12}, [1], "gsm8k", 3)
    expected = list(range(12))
    stream(3, "gsm8k", "epoch", 1).shuffle(expected)
    assert [one.at(12 + offset) for offset in range(12)] == expected
    rest = [index for index in range(12) if index not in {1, 2}]
    stream(3, "gsm8k", "round", 4, 1).shuffle(rest)
    assert one.others(8, 3, {1, 2}, "round", 4, 1) == rest[:3]


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"question": f"{name}{index}?", "answer": f"#### {index}"} for index in range(count)]


def task(folder: Path, weights: dict[str, float], sizes: dict[str, int] = SIZES, **fields: Any) -> Gsm8kTask:
    mix = {}
    for name, weight in weights.items():
        path = folder / f"{name}{sizes[name]}.jsonl"
        if not path.exists():
            write(path, rows(name, sizes[name]))
        mix[name] = SetConfig(str(path), weight)
    return Gsm8kTask(jsonl_config(None, mix=mix, **fields), TOKENIZER)


def drawn(of: Gsm8kTask, step: int, count: int, round: int = 0) -> list[str]:
    return [prompt.text for prompt in of.train_prompts(step, count, round)]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7)), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_a_resume_with_another_batch_size_neither_skips_nor_repeats(legs: list[tuple[int, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        order, state, step = [], None, 0
        for steps, count in legs:
            of = task(Path(name), {"a": 3, "b": 1, "c": 0.5})
            assert of.continue_at(step, state) is None
            for _ in range(steps):
                order += drawn(of, step, count)
                step += 1
            state = json.loads(json.dumps(of.data_state(step, count)))
        assert order == drawn(task(Path(name), {"a": 3, "b": 1, "c": 0.5}), 0, len(order))


def test_other_weights_go_on_in_every_set_where_it_was(tmp_path: Path) -> None:
    first = task(tmp_path, {"a": 1, "b": 1})
    seen = drawn(first, 0, 4) + drawn(first, 1, 4)
    state = json.loads(json.dumps(first.data_state(2, 4)))
    assert state["sets"]["a"]["drawn"] == state["sets"]["b"]["drawn"] == 4
    other = task(tmp_path, {"a": 1, "b": 4, "c": 1})
    note = other.continue_at(2, state)
    assert (
        note
        == "the data sets or their weights are others: a goes on after 4, b goes on after 4 drawn problems; c from the beginning"
    )
    went_on = drawn(other, 2, 30)
    assert not set(seen) & {text for text in went_on if text.startswith("b")}, "b has 30 problems, 24 were drawn"
    assert Counter(text[0] for text in went_on) == {"a": 5, "b": 20, "c": 5}
    again = task(tmp_path, {"a": 1, "b": 4, "c": 1})  # and a second resume, with the same weights, changes nothing
    assert again.continue_at(3, json.loads(json.dumps(other.data_state(3, 30)))) is None
    assert drawn(again, 3, 9) == drawn(other, 2, 39)[30:]
    replaced = task(tmp_path, {"a": 1, "b": 1}, SIZES | {"a": 8})
    assert "b goes on after 4 drawn problems; a from the beginning" in (replaced.continue_at(2, state) or "")
    assert "from their beginning" in (task(tmp_path, {"a": 1, "b": 1}, seed=9).continue_at(2, state) or "")


def test_further_rounds_keep_the_weights_and_avoid_what_was_drawn(tmp_path: Path) -> None:
    of = task(tmp_path, {"a": 1, "b": 3})
    rounds = [drawn(of, 2, 8, round) for round in range(3)]
    assert [Counter(text[0] for text in texts) for texts in rounds] == [{"a": 2, "b": 6}] * 3
    assert len(set(sum(rounds, []))) == 24


def test_sets_bring_columns_and_their_prompts_say_where_they_are_from(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"prompt": "x?", "label": 1}])
    write(tmp_path / "y.jsonl", rows("y", 1))
    mix = {
        "x": SetConfig(str(tmp_path / "x.jsonl"), 1, ColumnsConfig("prompt", "label")),
        "y": SetConfig(str(tmp_path / "y.jsonl"), 1),
    }
    of = Gsm8kTask(jsonl_config(None, mix=mix), TOKENIZER)
    prompts = of.train_prompts(0, 2)
    assert {prompt.info["set"]: prompt.text for prompt in prompts} == {"x": "x?", "y": "y0?"}
    assert len({prompt.prompt_id for prompt in of.train_prompts(0, 20)}) == 20
    mix["x"].columns.answer = "lable"
    with pytest.raises(UserError, match="no column 'lable': there are prompt, label") as caught:
        Gsm8kTask(jsonl_config(None, mix=mix), TOKENIZER)
    assert caught.value.key == "task.mix.x.path" and "task.mix.x.columns.answer" in str(caught.value.fix)


def test_on_the_command_line(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", rows("x", 3))
    base = ["task=gsm8k", "model=tiny_dense", "task.max_prompt_tokens=64", f"task.eval_path={tmp_path / 'x.jsonl'}"]
    mix = [f"+task.mix.x.path={tmp_path / 'x.jsonl'}", "+task.mix.x.weight=0.7", "+task.mix.x.columns.answer=label"]
    cfg = compose.load([*base, "task.train_path=null", *mix]).config
    found = cfg.task.mix["x"]  # type: ignore[attr-defined]
    assert (found.weight, found.columns.answer, found.columns.prompt) == (0.7, "label", None)
    with pytest.raises(UserErrors) as caught:  # gsm8k has a train_path by itself
        compose.load(
            [*base, *mix, "+task.mix.y.path=y.jsonl", "+task.mix.y.weight=0.123457", "+task.mix.z.path=z", "+task.mix.z.weight=0"]
        )
    told = str(caught.value)
    assert "task.mix names the training data" in told and "fix: task.train_path=null" in told, told
    assert "repeat after" in told and "must be above 0" in told


def test_sets_come_and_go_on_the_command_line_of_a_resumed_run(tmp_path: Path) -> None:
    task = ["task=dataset", "model=tiny_dense", "task.max_prompt_tokens=64", f"task.eval_path={tmp_path / 'x.jsonl'}"]
    sets = [f"+task.mix.{name}.{key}={value}" for name in "xy" for key, value in (("path", f"{name}.jsonl"), ("weight", 1))]

    def resumed(*new: str) -> Any:
        """The task of the run that goes on with these overrides, which are its own from then on."""
        loaded = compose.load([f"resume={tmp_path / 'run'}", *new])
        recorded.write_overrides(tmp_path / "run", loaded.overrides)
        return loaded.config.task

    recorded.write_overrides(tmp_path / "run", [*task, *sets, "+task.graders.y=choice"])
    assert (resumed("task.graders.y=exact").graders, resumed("task.mix.y.weight=3").mix["y"].weight) == ({"y": "exact"}, 3)
    removed = resumed("~task.mix.y", "~task.graders.y")
    assert list(removed.mix) == ["x"] and removed.graders == {} and list(resumed().mix) == ["x"]
    again = resumed("+task.mix.y.path=z.jsonl", "+task.mix.y.weight=2")
    assert (again.mix["y"].path, again.mix["y"].weight, again.graders) == ("z.jsonl", 2, {})
    with pytest.raises(UserErrors, match="task.mix has no entry 'z'") as caught:
        compose.load([*task, *sets, "~task.mix.z"])
    assert "x, y" in str(caught.value)
    with pytest.raises(UserErrors, match="cannot be removed"):
        compose.load([*task, *sets, "~task.mix.x.weight"])
