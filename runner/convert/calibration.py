"""Calibration data of GPTQ: rows of a data file become texts, texts become tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from runner.errors import UserError
from runner.tasks.encoding import MAX_CHARACTERS_PER_TOKEN, TextEncoder
from runner.tasks.files import SUFFIXES, read_file

KEY = "convert.calibration"
ROWS = "lines need `text`, `question` and `answer` (GSM8K), or `messages`"


def is_file(calibration: str) -> bool:
    """Whether this names a file here (also one that is missing) and not a hub dataset."""
    path = Path(calibration).expanduser()
    return path.exists() or path.suffix in {".jsonl", ".json", *SUFFIXES} or calibration.startswith((".", "/", "~"))


def hub_dataset(calibration: str) -> tuple[str, str | None]:
    """`openai/gsm8k:main` -> ("openai/gsm8k", "main"); the configuration may be left out."""
    name, _, config = calibration.partition(":")
    return name, config or None


def read_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, num_samples: int, max_tokens: int) -> list[list[int]]:
    """The first `num_samples` texts of a data file as token ids, each cut to `max_tokens`.

    UserError for a line without text (named), and for a file with fewer samples than asked for.
    """
    found: list[list[int]] = []
    encoder = TextEncoder(tokenizer)
    for place, row in read_file(path, KEY):
        try:
            text = text_of(encoder.hide(row), place, tokenizer)
            tokens = encoder.encode([text[: max_tokens * MAX_CHARACTERS_PER_TOKEN]])[0][:max_tokens]
        except UserError:
            raise
        except Exception as error:  # templates and tokenizers raise many kinds
            first = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(f"{place}: {first}", key=KEY, fix="mend or remove this line") from error
        if not tokens:
            raise UserError(f"{place}: an empty text", key=KEY, fix="remove this line")
        found.append(tokens)
        if len(found) == num_samples:
            return found
    raise UserError(
        f"{path} holds {len(found)} samples, {num_samples} are asked for",
        key="convert.calibration_samples",
        fix=f"convert.calibration_samples={len(found)}" if found else ROWS,
    )


def text_of(row: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row's text: `text`, or question and answer, or messages in the tokenizer's chat format."""
    problem: Callable[[str], UserError] = lambda text: UserError(f"{place}: {text}", key=KEY, fix=ROWS)  # noqa: E731
    if "messages" in row:
        if tokenizer.chat_template is None:
            raise problem("has `messages`, but the tokenizer has no chat template")
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    fields = ("text",) if "text" in row else ("question", "answer")
    missing = [field for field in fields if not isinstance(row.get(field), str)]
    if missing:
        raise problem(f"no string {' and '.join(f'`{field}`' for field in missing)} among {', '.join(row) or 'no fields'}")
    return "\n".join(row[field] for field in fields)
