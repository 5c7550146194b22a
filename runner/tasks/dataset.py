"""Any data set of prompts and answers: a row is {"prompt": text or messages, "answer": what task.grader compares with}."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runner.config.limits import LONGEST_SECONDS, number, one_of
from runner.config.option import Option
from runner.config.schema import Config
from runner.errors import UserError
from runner.tasks import graders
from runner.tasks.files import Split
from runner.tasks.graders import GRADERS, Grader, listed
from runner.tasks.jsonl import MACHINE, NEEDS, RULES, ColumnsConfig, JsonlTask, JsonlTaskConfig, Problem, conversation
from runner.tasks.protocol import Prompt
from runner.tasks.unit_tests import UnitTests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runner.data import Sample


@dataclass
class DatasetTaskConfig(JsonlTaskConfig):
    grader: str = one_of(among=graders.names)
    graders: dict[str, str] = field(default_factory=dict)  # by name of a set of task.mix, where they differ
    test_seconds: float = number(gt=0, le=LONGEST_SECONDS)  # grader=code: of each test
    test_memory_mib: int = number(ge=64, le=2**20)


class DatasetTask(JsonlTask):
    name = "dataset"
    choices_field = "choices"

    def __init__(self, cfg: DatasetTaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._graders: dict[str, Grader] = {}
        for name in (cfg.grader, *cfg.graders.values()):
            made = UnitTests(cfg.test_seconds, cfg.test_memory_mib) if name == "code" else GRADERS[name]()
            self._graders.setdefault(name, made)
        self._grader, self._given = cfg.grader, lambda name: cfg.graders.get(name, cfg.grader)
        super().__init__(cfg, tokenizer)

    def parse(self, row: dict[str, Any], place: str) -> Problem:
        messages = conversation(row["prompt"], "prompt")
        answer, info = self._graders[self._grader].reference(row)
        if self._grader == "choice" and row.get("choices") is not None:
            *before, last = messages
            messages = (*before, last | {"content": f"{last['content']}\n{listed(row['choices'])}"})
        return Problem(messages, answer, place, {"grader": self._grader, **info})

    def reward(self, prompt: Prompt, text: str, sample: Sample | None = None) -> float:
        return self._graders[prompt.info["grader"]].reward(prompt, text)

    def _load(self, source: str, key: str, split: Split, limit: int, columns: ColumnsConfig, set_name: str = "") -> list[Problem]:
        self._grader = self._given(set_name)
        return super()._load(source, key, split, limit, columns, set_name)


def graders_of_sets(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    assert isinstance(task, DatasetTaskConfig)
    for name, grader in task.graders.items():
        key = f"task.graders.{name}"
        if name not in task.mix:
            problem = f"{name!r} is none of the data sets of task.mix: {', '.join(task.mix) or 'there are none'}"
            yield UserError(problem, key=key, fix=f"'~{key}', or the name of a set")
        if grader not in GRADERS:
            yield UserError(f"{grader!r} is none of {', '.join(GRADERS)}", key=key, fix=f"{key}={next(iter(GRADERS))}")


def time_for_tests(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    assert isinstance(task, DatasetTaskConfig)
    if "code" in (task.grader, *task.graders.values()) and task.test_seconds >= task.reward_timeout_seconds:
        yield UserError(
            f"one test may take {task.test_seconds:g} s, the reward of a response {task.reward_timeout_seconds:g} s",
            key="task.reward_timeout_seconds",
            fix=f"task.reward_timeout_seconds={task.test_seconds * 10:g}",
        )


OPTION = Option(DatasetTaskConfig, rules=(*RULES, graders_of_sets, time_for_tests), machine=MACHINE, needs=NEEDS)
