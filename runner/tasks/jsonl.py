"""Problems from data files (files.py): parsing, prompts, and the order in which training draws them (mixture.py)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from runner.config import preflight
from runner.config.limits import lines, number, path
from runner.config.option import Need
from runner.config.overrides import shell, typed
from runner.config.schema import Config, TaskConfig
from runner.errors import UserError
from runner.tasks.encoding import TextEncoder, check_characters, check_length
from runner.tasks.files import INSTALL, Split, needs_arrow, rows
from runner.tasks.mixture import Mixture, shares
from runner.tasks.protocol import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runner.data import Sample


@dataclass
class ColumnsConfig:
    """What the data calls a prompt and its answer; null: what the task calls them. `a.b` is field b of column a."""

    prompt: Optional[str] = None  # a text, or a list of chat messages
    answer: Optional[str] = None
    choices: Optional[str] = None  # of task=dataset: the options of a multiple choice


@dataclass
class SetConfig:
    """One of several data sets that training draws from."""

    path: str = path()  # a file, a folder or a hub id
    weight: float = number(gt=0, le=10**6)  # of its problems among those that are drawn, beside the other sets' weights
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)  # where they are not those of the task


@dataclass
class JsonlTaskConfig(TaskConfig):
    """Tasks with a prompt and a reference answer per row."""

    prompt_template: str = lines()
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    mix: dict[str, SetConfig] = field(default_factory=dict)  # by name, in place of train_path
    max_train_problems: int = number(ge=0, le=10**12)  # 0: all
    max_eval_problems: int = number(ge=0, le=10**12)


@dataclass(frozen=True)
class Problem:
    """One row of a data set: the conversation so far, the reference answer, and where it came from."""

    messages: tuple[dict[str, str], ...]
    answer: str
    place: str  # "train.jsonl:17"
    info: dict[str, Any] = field(default_factory=dict)  # becomes part of its prompt's


class JsonlTask:
    """Base of tasks whose problems lie in files; a subclass parses one row and grades a response."""

    name: str
    prompt_field, answer_field = "prompt", "answer"  # of a row, as `parse` reads it
    choices_field: str | None = None
    train_file = "train.jsonl"  # inside a folder given as train_path or eval_path
    eval_file = "test.jsonl"
    train_split = "train"  # of a hub dataset
    eval_split = "test"
    hub_config: str | None = None

    def __init__(self, cfg: JsonlTaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads and tokenizes everything, so that bad data stops the run before it starts.

        UserError for a missing or unreadable file, a malformed line (named), no problems, prompts that are too long.
        """
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        if "{question}" not in cfg.prompt_template:
            raise UserError(
                "the template has no {question}",
                key="task.prompt_template",
                fix=f"for example {shell(typed('task.prompt_template', '{question}'))}",
            )
        sets = train_sets(cfg)
        if not sets:
            raise UserError(f"task {self.name} needs data", key="task.train_path", fix="set it to a file, a folder or a hub id")
        self._train: list[Prompt] = []
        self._contents: dict[str, str] = {}  # data set -> digest of its problems
        training, held_out = self._splits()
        for name, given in sets.items():
            key = f"task.mix.{name}.path" if name else "task.train_path"
            problems = self._load(given.path, key, training, cfg.max_train_problems, given.columns, name)
            self._contents[name] = _digest(problems)
            self._train += self._prompts(problems, key, self.train_split, len(self._train))
        sizes = Counter(str(prompt.info.get("set", "")) for prompt in self._train)
        self._order = Mixture(sizes, [given.weight for given in sets.values()], self.name, cfg.seed)
        self._origin = (0, 0)  # a step, and the position in the order before it
        self._eval: list[Prompt] | None = None
        if cfg.eval_path is not None:
            problems = self._load(cfg.eval_path, "task.eval_path", held_out, cfg.max_eval_problems, cfg.columns)
            self._eval = self._prompts(problems, "task.eval_path", self.eval_split)
            self._check_held_out(cfg.eval_path, self._eval)

    def _check_held_out(self, source: str, prompts: list[Prompt]) -> None:
        """A folder that says no splits is read whole by both sides; who names one file twice, means it."""
        trained = {prompt.info["place"] for prompt in self._train} if Path(source).expanduser().is_dir() else set()
        shared = [prompt.info["place"] for prompt in prompts if prompt.info["place"] in trained]
        if shared:
            problem = f"{len(shared)} problems of '{source}' are trained on, too; the first is {shared[0]}"
            raise UserError(problem, key="task.eval_path", fix="a folder with splits, or a file that training does not read")

    def _splits(self) -> tuple[Split, Split]:
        """What training and evaluation read of a folder or a hub data set."""
        held_out = ("test", "eval", "validation", "valid", "val", "dev")
        training = Split(self.train_file, self.train_split, ("train",), self.hub_config)
        return training, Split(self.eval_file, self.eval_split, (*held_out, self.eval_split), self.hub_config)

    def parse(self, row: dict[str, Any], place: str) -> Problem:
        """A Problem from the fields of one row; KeyError, TypeError or ValueError with a reason when one is missing or wrong."""
        raise NotImplementedError

    def grade(self, answer: str, text: str) -> bool:
        """Whether the response's final answer equals the reference answer."""
        raise NotImplementedError

    def reward(self, prompt: Prompt, text: str, sample: Sample | None = None) -> float:
        return float(self.grade(prompt.answer, text))

    def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
        """See Task. Round 0 walks on through the order of the problems (mixture.py); later rounds draw from those
        that earlier rounds of this step (of equal `count`) did not use, as long as there are any."""
        start = self._position(step, count)
        if round == 0:
            indices = [self._order.at(start + offset) for offset in range(count)]
        else:
            used = {index for earlier in range(round) for index in self._indices_of(step, count, earlier)}
            indices = self._order.others(start, count, used, "round", step, round)
        return [self._drawn(index, f"{step}.{round}.{offset}") for offset, index in enumerate(indices)]

    def eval_prompts(self, count: int) -> list[Prompt]:
        if self._eval is None:
            raise UserError(
                f"evaluation needs held-out {self.name} problems",
                key="task.eval_path",
                fix="set it, or evaluation.interval_steps=0",
            )
        return self._eval[:count]

    def data_state(self, step: int, count: int) -> dict[str, Any]:
        """See WalksThroughData."""
        position = self._position(step, count)
        drawn = self._order.drawn(position)
        sets = {name: {"drawn": drawn[name], "contents": contents} for name, contents in self._contents.items() if name}
        problems = {"problems": len(self._train), "contents": self._all_contents()} | ({"sets": sets} if sets else {})
        return {"position": position, "seed": self.cfg.seed, **problems}

    def continue_at(self, step: int, state: dict[str, Any] | None) -> str | None:
        """See WalksThroughData. A set of a mixture that is the same goes on at its own place, whatever the weights are."""
        self._origin = (0, 0)
        self._order.continue_at(0, {})
        if state is None:
            return None
        same_order = state.get("seed") == self.cfg.seed
        before = {name: entry for name, entry in state.get("sets", {}).items() if same_order}
        kept = {name: before[name]["drawn"] for name, contents in self._contents.items()
                if name in before and before[name]["contents"] == contents}  # fmt: skip
        same_problems = state.get("contents") == self._all_contents()
        if same_problems and same_order:
            self._origin = (step, state["position"])
            if kept:
                self._order.continue_at(state["position"], kept)
            return None
        self._origin = (step, 0)
        self._order.continue_at(0, kept)
        if kept:
            told = ", ".join(f"{name} goes on after {count}" for name, count in kept.items())
            fresh = ", ".join(name for name in self._contents if name not in kept)
            note = f"the data sets or their weights are others: {told} drawn problems"
            return note + (f"; {fresh} from the beginning" if fresh else "")
        what = (
            "the order of the problems is another" if same_problems else "the training data are not those that the run began with"
        )
        read = f"{state['position']} of {state['problems']} were drawn" if state else "none were read"
        return f"{what} ({read} before step {step + 1}): the {len(self._train)} problems of now are drawn from their beginning"

    def _all_contents(self) -> str:
        """Digest of all training problems and of what their order depends on, beside the seed."""
        if not self.cfg.mix:
            return self._contents[""]
        weights = [(name, str(given.weight), self._contents[name]) for name, given in self.cfg.mix.items()]
        return hashlib.blake2b(json.dumps(weights).encode(), digest_size=16).hexdigest()

    def _position(self, step: int, count: int) -> int:
        """Where `step` begins in the order: problems that the steps before it drew in their first rounds."""
        first_step, drawn = self._origin
        return drawn + (step - first_step) * count

    def _indices_of(self, step: int, count: int, round: int) -> list[int]:
        return [prompt.info["index"] for prompt in self.train_prompts(step, count, round)]

    def _drawn(self, index: int, draw: str) -> Prompt:
        prompt = self._train[index]
        return Prompt(f"{prompt.prompt_id}/{draw}", prompt.text, prompt.tokens, prompt.answer, prompt.info)

    def _load(self, source: str, key: str, split: Split, limit: int, columns: ColumnsConfig, set_name: str = "") -> list[Problem]:
        """The problems of one data set; UserError naming the row that is none."""
        names = {self.prompt_field: columns.prompt, self.answer_field: columns.answer}
        if self.choices_field is not None:
            names[self.choices_field] = columns.choices
        elif columns.choices is not None:
            raise UserError(
                f"task={self.name} reads no choices", key="task.columns.choices", fix="task=dataset task.grader=choice"
            )
        problems = []
        for place, row in rows(source, key, split):
            try:
                given = row | {own: _column(row, name) for own, name in names.items() if name is not None}
                problem = self.parse(given, place)
                check_characters(problem.answer)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                reason = f"no field {error} among {', '.join(map(str, row)) or 'none'}" if type(error) is KeyError else str(error)
                raise UserError(f"{place}: {reason}", key=key, fix=self._columns_fix(error, key)) from error
            problems.append(replace(problem, info=problem.info | {"set": set_name}) if set_name else problem)
            if limit and len(problems) == limit:
                break
        if not problems:
            raise UserError(f"'{source}' holds no problems", key=key, fix="give a file with one problem per row")
        return problems

    def _columns_fix(self, error: Exception, key: str) -> str:
        if not isinstance(error, KeyError):
            return f"every row must be a {self.name} problem"
        section = key.removesuffix(".path") if key.startswith("task.mix.") else "task"
        return f"{section}.columns.prompt and {section}.columns.answer name the columns"

    def _prompts(self, problems: list[Problem], key: str, split: str, start: int = 0) -> list[Prompt]:
        """Their prompts; `start`: how many there are before them."""
        texts = [self._text(problem, key) for problem in problems]
        token_lists = self._tokenize(problems, texts, key)
        limit = self.cfg.max_prompt_tokens
        too_long = [i for i, tokens in enumerate(token_lists) if len(tokens) > limit]
        if too_long:
            longest = max(len(tokens) for tokens in token_lists)
            raise UserError(
                f"{len(too_long)} of {len(problems)} prompts are longer than task.max_prompt_tokens={limit}; "
                f"the first is {problems[too_long[0]].place}",
                key=key,
                fix=f"task.max_prompt_tokens={longest} fits the longest",
            )
        return [
            Prompt(
                f"{self.name}/{split}.{i}",
                self.encoder.show(text),
                tuple(tokens),
                problem.answer,
                {"index": i, "place": problem.place, **problem.info},
            )
            for i, (problem, text, tokens) in enumerate(zip(problems, texts, token_lists, strict=True), start)
        ]

    def _tokenize(self, problems: list[Problem], texts: list[str], key: str) -> Sequence[Sequence[int]]:
        """Token ids of every problem's prompt; `key` says where the problems come from, for errors."""
        try:
            return self.encoder.encode(texts)
        except Exception:  # tokenizers raise many kinds; the one line that they refuse is found below
            for problem, text in zip(problems, texts, strict=True):
                with self._naming(problem, key, "the tokenizer refuses it"):
                    self.encoder.encode([text])
            raise

    def _text(self, problem: Problem, key: str) -> str:
        """The conversation, its last message put into the template, in the tokenizer's chat format where it has one.

        Special tokens that the data names are hidden (see encoding.py). UserError naming the line that cannot be a prompt.
        """
        with self._naming(problem, key, "it cannot be a prompt"):
            check_length(problem.messages, self.cfg.max_prompt_tokens)
            *before, last = (self._hidden(message) for message in problem.messages)
            content = self.cfg.prompt_template.replace("{question}", last["content"])
        conversation = [*before, last | {"content": content}]
        if self.tokenizer.chat_template is None:
            return "\n".join(message["content"] for message in conversation)
        with self._naming(problem, key, "the chat template of the tokenizer refuses it"):
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        raise AssertionError

    def _hidden(self, message: dict[str, str]) -> dict[str, str]:
        hidden: dict[str, str] = self.encoder.hide(message)
        return hidden

    @contextmanager
    def _naming(self, problem: Problem, key: str, what: str) -> Iterator[None]:
        """Whatever is raised inside becomes a UserError with the problem's line: templates and tokenizers raise many kinds."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(f"{problem.place}: {what}: {first}", key=key, fix="mend or remove this line") from error


def _digest(problems: list[Problem]) -> str:
    """Equal for equal problems in equal order, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for problem in problems:
        digest.update(json.dumps([problem.messages, problem.answer]).encode())
    return digest.hexdigest()


class NoColumn(KeyError):
    """A column that the data does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


def _column(row: dict[str, Any], name: str) -> Any:
    """The value of a column, or of a field inside one: `reward_model.ground_truth`. NoColumn naming those that there are."""
    if name in row:
        return row[name]
    value: Any = row
    done: list[str] = []
    for part in name.split("."):
        if not isinstance(value, dict):
            raise NoColumn(f"no column '{name}': {'.'.join(done)} is {type(value).__name__}, without fields")
        if part not in value:
            inside = f"{'.'.join(done)} has" if done else "there are"
            raise NoColumn(f"no column '{name}': {inside} {', '.join(map(str, value)) or 'none'}")
        value = value[part]
        done.append(part)
    return value


def conversation(value: Any, field: str) -> tuple[dict[str, str], ...]:
    """The messages of a prompt: a text is one of the user. TypeError or ValueError for what is no conversation to go on with."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list | tuple):
        raise TypeError(f"`{field}` must be a string or a list of messages, not {type(value).__name__}")
    if not messages:
        raise ValueError(f"`{field}` has no messages")
    for message in messages:
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"every message of `{field}` needs a `role` and a `content` string")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"`{field}` ends with an answer of the assistant")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def train_sets(cfg: JsonlTaskConfig) -> dict[str, SetConfig]:
    """Name -> training set, each with columns of its own; task.train_path alone is ''."""
    if not cfg.mix:
        return {"": SetConfig(cfg.train_path, 1, cfg.columns)} if cfg.train_path else {}
    return {name: SetConfig(given.path, given.weight, _over(cfg.columns, given.columns)) for name, given in cfg.mix.items()}


def _over(task: ColumnsConfig, own: ColumnsConfig) -> ColumnsConfig:
    return ColumnsConfig(own.prompt or task.prompt, own.answer or task.answer, own.choices or task.choices)


def _paths(cfg: Config) -> dict[str, str | None]:
    """Key -> path of everything that is read."""
    task = cfg.task
    assert isinstance(task, JsonlTaskConfig)
    mix = {f"task.mix.{name}.path": given.path for name, given in task.mix.items()}
    return mix | ({} if mix else {"task.train_path": task.train_path}) | {"task.eval_path": task.eval_path}


def reads_a_file(cfg: Config) -> Iterator[UserError]:
    for key, given in _paths(cfg).items():
        if not given:
            yield UserError(f"task={cfg.task.name} reads its problems from a file", key=key, fix=f"{key}=<file.jsonl>")
    task = cfg.task
    assert isinstance(task, JsonlTaskConfig)
    if "{question}" not in task.prompt_template:
        yield UserError(
            "the template has no {question}: every prompt would be the same",
            key="task.prompt_template",
            fix=f"put {{question}} into it, for example {shell(typed('task.prompt_template', '{question}'))}",
        )


def mixes(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    assert isinstance(task, JsonlTaskConfig)
    if task.mix and task.train_path:
        problem = f"task.mix names the training data, and so does task.train_path={task.train_path}"
        yield UserError(problem, key="task.train_path", fix="task.train_path=null")
    try:
        shares([given.weight for given in task.mix.values()] or [1])
    except ValueError as error:
        yield UserError(str(error), key="task.mix", fix="round the weights")


def files(cfg: Config) -> Iterator[UserError]:
    yield from preflight.missing(_paths(cfg))


def _tables(cfg: Config) -> bool:
    return any(given and needs_arrow(given) for given in _paths(cfg).values())


RULES, MACHINE = (reads_a_file, mixes), (files,)
_MISSING = "Parquet and Arrow files are read by pyarrow, which is not installed"
NEEDS = (Need("pyarrow", "pyarrow", _MISSING, INSTALL, key="task", when=_tables),)
