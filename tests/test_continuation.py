"""What a resume changes is named, and what it must not change stays: the learning-rate plan and the place in the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config import compose
from runner.config.schema import Config
from runner.models.tokenizer import byte_tokenizer
from runner.run import checkpoint, continuation
from runner.run.collect import Collector
from runner.tasks.gsm8k import Gsm8kTask
from runner.tasks.jsonl import JsonlTaskConfig
from runner.trainer.optimizer import learning_rate, planned_steps

TOKENIZER = byte_tokenizer()


def written(folder: Path, name: str, count: int) -> Path:
    rows = [{"question": f"{name}{i}?", "answer": f"#### {i}"} for i in range(count)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(path: Path, **fields: Any) -> Gsm8kTask:
    base: dict[str, Any] = {
        "name": "gsm8k", "train_path": str(path), "eval_path": None, "max_prompt_tokens": 64, "reward_timeout_seconds": 1.0,
        "seed": 3, "prompt_template": "{question}", "max_train_problems": 0, "max_eval_problems": 0,
    }  # fmt: skip
    return Gsm8kTask(JsonlTaskConfig(**(base | fields)), TOKENIZER)


def drawn(of: Gsm8kTask, step: int, count: int, round: int = 0) -> list[int]:
    return [prompt.info["index"] for prompt in of.train_prompts(step, count, round)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7)), min_size=1, max_size=5))
def test_whatever_the_batch_sizes_every_pass_draws_every_problem_once(legs: list[tuple[int, int]]) -> None:
    """Each leg is a resumed run: some steps of some prompts."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), "A", 11)
        order, state, step = [], None, 0
        for steps, count in legs:
            of = task(path)
            assert of.continue_at(step, state) is None
            for _ in range(steps):
                order += drawn(of, step, count)
                step += 1
            state = json.loads(json.dumps(of.data_state(step, count)))
    unbroken = task_order(len(order))
    assert order == unbroken


def task_order(length: int) -> list[int]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        of = task(written(Path(folder), "A", 11))
        return [index for step in range(length) for index in drawn(of, step, 1)]


def test_other_problems_begin_at_their_beginning_and_are_named(tmp_path: Path) -> None:
    first = task(written(tmp_path, "A", 24))
    state = first.data_state(2, 4)
    other = task(written(tmp_path, "B", 10))
    note = other.continue_at(2, state)
    assert note and "8 of 24 were drawn before step 3" in note and "the 10 problems" in note
    assert drawn(other, 2, 4) + drawn(other, 3, 4) == drawn(task(tmp_path / "B.jsonl"), 0, 8)
    grown = written(tmp_path, "A", 25)  # the same file, one problem more
    assert "not those that the run began with" in (task(grown).continue_at(2, state) or "")
    assert "made up" not in note and "none were read" in (other.continue_at(2, {}) or "")


def test_another_order_is_named_and_another_template_or_place_is_no_change(tmp_path: Path) -> None:
    path = written(tmp_path, "A", 24)
    state = task(path).data_state(2, 4)
    assert "the order of the problems is another" in (task(path, seed=4).continue_at(2, state) or "")
    moved = path.rename(tmp_path / "moved.jsonl")
    same = task(moved, prompt_template="Q: {question}")
    assert same.continue_at(2, state) is None
    assert drawn(same, 2, 4) == drawn(task(moved), 2, 4)


def test_further_rounds_avoid_what_the_resumed_step_drew(tmp_path: Path) -> None:
    of = task(written(tmp_path, "A", 12))
    of.continue_at(3, of.data_state(3, 2))
    assert not set(drawn(of, 3, 4)) & set(drawn(of, 3, 4, round=1))


class Plain:
    """A task that makes its problems up."""


def collector(cfg: Config, of: Any) -> Collector:
    return Collector(cfg, of, None, str, (), lambda: False, print)  # type: ignore[arg-type]


def config(*overrides: str) -> Config:
    return compose.load(["model=tiny_dense", *overrides]).config


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_made_longer_keeps_its_learning_rate_plan(schedule: str, tmp_path: Path) -> None:
    given = [
        f"trainer.optimizer.lr_schedule={schedule}",
        "trainer.optimizer.lr_min_ratio=0.1",
        "trainer.optimizer.lr_warmup_steps=0",
    ]
    begun = config(*given, "steps=4")
    state = continuation.remembered(begun, collector(begun, Plain()), 4)
    saved = checkpoint.save(tmp_path, 4, state, lambda folder: None, keep=1)
    longer = config(*given, "steps=8")
    continuation.keep_schedule(longer, saved)
    rates = [learning_rate(c.trainer.optimizer, step, planned_steps(c)) for c, steps in ((begun, range(4)), (longer, range(4, 8)))
             for step in steps]  # fmt: skip
    assert rates == sorted(rates, reverse=True) and rates[4:] == [pytest.approx(0.1 * begun.trainer.optimizer.lr)] * 4
    (note,) = continuation.go_on(longer, collector(longer, Plain()), checkpoint.read_state(saved))
    assert f"the {schedule} learning rate keeps its plan of {planned_steps(begun)}" in note
    again = continuation.remembered(longer, collector(longer, Plain()), 8)
    assert again["lr_decay_steps"] == planned_steps(begun)  # and so does the resume after this one
    new_plan = config(*given, "steps=8", "trainer.optimizer.lr_decay_steps=8")
    continuation.keep_schedule(new_plan, saved)
    assert planned_steps(new_plan) == 8


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("warmup", [0, 2, 4, 10])
def test_a_run_made_longer_never_raises_its_rate_beyond_its_plan(
    schedule: str, ratio: float, warmup: int, tmp_path: Path
) -> None:
    """A warm-up that the first steps did not finish is not gone on with: the plan of four updates is over."""
    given = [
        f"trainer.optimizer.{key}" for key in (f"lr_schedule={schedule}", f"lr_min_ratio={ratio}", f"lr_warmup_steps={warmup}")
    ]
    begun, longer = config(*given, "steps=4"), config(*given, "steps=16")
    saved = checkpoint.save(
        tmp_path, 4, continuation.remembered(begun, collector(begun, Plain()), 4), lambda folder: None, keep=1
    )
    continuation.keep_schedule(longer, saved)
    rates = [learning_rate(longer.trainer.optimizer, step, planned_steps(longer)) for step in range(16)]
    assert rates[:4] == [learning_rate(begun.trainer.optimizer, step, planned_steps(begun)) for step in range(4)]
    notes = continuation.go_on(longer, collector(longer, Plain()), checkpoint.read_state(saved))
    if schedule == "constant":  # whose plan has no end: it warms up, and stays
        assert rates == sorted(rates) and rates[-1] == begun.trainer.optimizer.lr and notes == []
    else:
        assert max(rates[4:]) <= rates[3] and len(set(rates[4:])) == 1
        assert f"keeps its plan of 4 updates, after which it is {rates[-1]:g}; the run now has 16" in notes[0]


def test_changed_options_are_named_and_unchanged_ones_are_not() -> None:
    before = config("steps=4")
    state = {"step": 4} | json.loads(json.dumps(continuation.remembered(before, collector(before, Plain()), 4)))
    same = config("steps=9", "run_name=x", "tracking=none", "checkpoint.keep=7")
    assert continuation.go_on(same, collector(same, Plain()), state) == []
    other = config("steps=4", "algorithm.prompts_per_step=8", "algorithm.kl_coef=0.5")
    (note,) = continuation.go_on(other, collector(other, Plain()), state)
    assert note.startswith("from step 5 on with other options: ")
    assert f"algorithm.prompts_per_step: {before.algorithm.prompts_per_step} -> 8" in note
    assert "algorithm.kl_coef: 0.0 -> 0.5" in note and "steps" not in note.partition("prompts_per_step")[2]
    assert continuation.go_on(other, collector(other, Plain()), {"step": 4}) == []  # a checkpoint of before
