"""Problems from JSONL files (or a hub dataset): reading, prompts, and the order in which training draws them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from runner.config import preflight
from runner.config.limits import lines, number
from runner.config.overrides import shell, typed
from runner.config.schema import Config, TaskConfig
from runner.errors import UserError
from runner.tasks.encoding import TextEncoder, check_characters, check_length
from runner.tasks.protocol import Prompt
from runner.tasks.seeding import stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runner.data import Sample

MAX_LINE_BYTES = 64 << 20  # an image of the largest size that is taken, as base64, and its text
OTHER_KINDS = {  # by their first bytes
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"PK\x03\x04": "a zip archive",
}


@dataclass
class JsonlTaskConfig(TaskConfig):
    """gsm8k, dapo_math: a prompt and a reference answer per line."""

    prompt_template: str = lines()
    max_train_problems: int = number(ge=0, le=10**12)  # 0: all
    max_eval_problems: int = number(ge=0, le=10**12)


@dataclass(frozen=True)
class Problem:
    """One line of a dataset: the conversation so far, the reference answer, and where it came from."""

    messages: tuple[dict[str, str], ...]
    answer: str
    place: str  # "train.jsonl:17"


class JsonlTask:
    """Base of tasks whose problems lie in a file; a subclass parses one row and grades a response."""

    name: str
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
        if cfg.train_path is None:
            raise UserError(
                f"task {self.name} needs data", key="task.train_path", fix="set it to a JSONL file, a folder or a hub id"
            )
        self._origin = (0, 0)  # a step, and the problems drawn before it
        self._contents = ""  # digest of the training problems
        self._train = self._load(cfg.train_path, "task.train_path", self.train_file, self.train_split, cfg.max_train_problems)
        self._eval: list[Prompt] | None = None
        if cfg.eval_path is not None:
            self._eval = self._load(cfg.eval_path, "task.eval_path", self.eval_file, self.eval_split, cfg.max_eval_problems)

    def parse(self, row: dict[str, Any], place: str) -> Problem:
        """A Problem from one JSON object; KeyError, TypeError or ValueError with a reason when a field is missing or wrong."""
        raise NotImplementedError

    def grade(self, answer: str, text: str) -> bool:
        """Whether the response's final answer equals the reference answer."""
        raise NotImplementedError

    def reward(self, prompt: Prompt, text: str, sample: Sample | None = None) -> float:
        return float(self.grade(prompt.answer, text))

    def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
        """See Task. Round 0 walks through a fresh permutation of the problems per epoch; later rounds draw from those
        that earlier rounds of this step (of equal `count`) did not use, as long as there are any."""
        if round == 0:
            start = self._position(step, count)
            indices = [self._at(start + offset) for offset in range(count)]
        else:
            used = {index for earlier in range(round) for index in self._indices_of(step, count, earlier)}
            rest = [index for index in range(len(self._train)) if index not in used] or list(range(len(self._train)))
            random_stream = stream(self.cfg.seed, self.name, "round", step, round)
            random_stream.shuffle(rest)
            indices = [rest[offset % len(rest)] for offset in range(count)]
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
        problems = {"problems": len(self._train), "contents": self._contents}
        return {"position": self._position(step, count), "seed": self.cfg.seed, **problems}

    def continue_at(self, step: int, state: dict[str, Any] | None) -> str | None:
        """See WalksThroughData."""
        self._origin = (0, 0)
        if state is None:
            return None
        same_problems = state.get("contents") == self._contents
        if same_problems and state["seed"] == self.cfg.seed:
            self._origin = (step, state["position"])
            return None
        self._origin = (step, 0)
        what = (
            "the order of the problems is another" if same_problems else "the training data are not those that the run began with"
        )
        before = f"{state['position']} of {state['problems']} were drawn" if state else "none were read"
        return f"{what} ({before} before step {step + 1}): the {len(self._train)} problems of now are drawn from their beginning"

    def _position(self, step: int, count: int) -> int:
        """Problems that the steps before `step` drew in their first rounds."""
        first_step, drawn = self._origin
        return drawn + (step - first_step) * count

    def _indices_of(self, step: int, count: int, round: int) -> list[int]:
        return [prompt.info["index"] for prompt in self.train_prompts(step, count, round)]

    def _at(self, position: int) -> int:
        """The problem at this position of the endless training order."""
        epoch, offset = divmod(position, len(self._train))
        if getattr(self, "_epoch", None) != epoch:
            order = list(range(len(self._train)))
            stream(self.cfg.seed, self.name, "epoch", epoch).shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order[offset]

    def _drawn(self, index: int, draw: str) -> Prompt:
        prompt = self._train[index]
        return Prompt(f"{prompt.prompt_id}/{draw}", prompt.text, prompt.tokens, prompt.answer, prompt.info)

    def _load(self, source: str, key: str, file_name: str, split: str, limit: int) -> list[Prompt]:
        problems = []
        for place, row in _rows(source, key, file_name, split, self.hub_config):
            try:
                problems.append(self.parse(row, place))
                check_characters(problems[-1].answer)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{place}: {reason}", key=key, fix=f"every line must be a {self.name} problem") from error
            if limit and len(problems) == limit:
                break
        if not problems:
            raise UserError(f"'{source}' holds no problems", key=key, fix="give a file with one JSON object per line")
        if key == "task.train_path":
            self._contents = _digest(problems)
        return self._prompts(problems, key, split)

    def _prompts(self, problems: list[Problem], key: str, split: str) -> list[Prompt]:
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
                {"index": i, "place": problem.place},
            )
            for i, (problem, text, tokens) in enumerate(zip(problems, texts, token_lists, strict=True))
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


def _rows(source: str, key: str, file_name: str, split: str, hub_config: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source).expanduser()
    if path.is_dir():
        folder, path = path, path / file_name
        parquet = next((found for found in sorted(folder.rglob("*.parquet"))), None) if not path.exists() else None
        if parquet is not None:
            path = parquet  # says what it is
    if path.exists() or path.suffix in {".jsonl", ".json"} or source.startswith((".", "/", "~")):
        yield from read_jsonl(path, key)
    else:
        yield from _hub_rows(source, key, split, hub_config)


def _check_kind(path: Path, file: IO[bytes], key: str) -> None:
    """UserError for a file that says that it is something else; the file is at its beginning afterwards."""
    if not file.seekable():
        return
    first = file.read(8)
    file.seek(0)
    for start, name in OTHER_KINDS.items():
        if first.startswith(start):
            fix = "write its rows as a JSONL file" if name in ("a Parquet file", "an Arrow file") else "unpack it"
            raise UserError(f"'{path}' is {name}; data is read from JSONL files, one JSON object per line", key=key, fix=fix)


def _mend(line: bytes) -> str:
    return "one JSON object per line, without an array around them" if line.lstrip()[:1] == b"[" else "mend or remove this line"


def read_jsonl(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line that is not blank; UserError naming file and line."""
    try:
        with path.open("rb") as file:
            _check_kind(path, file, key)
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{place}: more than {MAX_LINE_BYTES >> 20} MiB in one line", key=key, fix="one JSON object per line"
                    )
                try:
                    row = json.loads(line)
                except RecursionError as error:
                    raise UserError(f"{place}: nested too deeply", key=key, fix="mend or remove this line") from error
                except ValueError as error:  # broken JSON or broken UTF-8
                    raise UserError(f"{place}: not JSON ({error})", key=key, fix=_mend(line)) from error
                if not isinstance(row, dict):
                    raise UserError(
                        f"{place}: a {type(row).__name__}, not a JSON object", key=key, fix="mend or remove this line"
                    )
                yield place, row
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}", key=key, fix="give the path of a JSONL file") from error


def _hub_rows(source: str, key: str, split: str, hub_config: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"'{source}' is not a file here, and reading it from the hub needs the `datasets` package",
            key=key,
            fix="give the path of a JSONL file, or pip install datasets",
        )
    load: Callable[..., Any] = importlib.import_module("datasets").load_dataset
    try:
        rows = load(source, hub_config, split=split)
    except Exception as error:  # the package raises many kinds: network, unknown id, unknown split
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load '{source}' from the hub: {first}", key=key, fix="give the path of a JSONL file") from error
    for place, row in enumerate(rows):
        yield f"{source}[{split}]:{place}", row


def reads_a_file(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    assert isinstance(task, JsonlTaskConfig)
    for key in ("train_path", "eval_path"):
        if not getattr(task, key):
            yield UserError(f"task={task.name} reads its problems from a file", key=f"task.{key}", fix=f"task.{key}=<file.jsonl>")
    if "{question}" not in task.prompt_template:
        yield UserError(
            "the template has no {question}: every prompt would be the same",
            key="task.prompt_template",
            fix=f"put {{question}} into it, for example {shell(typed('task.prompt_template', '{question}'))}",
        )


def files(cfg: Config) -> Iterator[UserError]:
    yield from preflight.missing({"task.train_path": cfg.task.train_path, "task.eval_path": cfg.task.eval_path})


RULES, MACHINE = (reads_a_file,), (files,)
