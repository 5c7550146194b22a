"""What makes a response right, for tasks whose data brings any kind of answer: `task.grader` names one of GRADERS.

A grader turns what a row holds into a reference answer in its own normal form, once, when the data is read; and compares
responses with it. Text of a model is parsed; the code of `code` runs in the sandbox of runner/tools and nowhere else.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, Protocol

from runner.tasks import symbolic
from runner.tasks.grading import after_hashes, final_answer, final_number, same_answer
from runner.tasks.numbers import quantity, unwrapped
from runner.tasks.protocol import Prompt
from runner.tasks.unit_tests import UnitTests

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\s+)?[(\[{*_\s]*([A-Za-z])(?:$|[)\]}*_.:,]|\s+[-\u2013\u2014]\s)", re.IGNORECASE
)


class Grader(Protocol):
    def reference(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The answer of a row in normal form, and what else grading needs, for the prompt's info. KeyError, TypeError or
        ValueError with a reason for an answer that is none."""
        ...

    def reward(self, prompt: Prompt, text: str) -> float:
        """From 0 to 1, for a response without special tokens."""
        ...


def _text(answer: Any) -> str:
    if not isinstance(answer, str | int) or isinstance(answer, bool) or not str(answer).strip():
        raise TypeError(f"the reference answer must be a string or an integer, not {type(answer).__name__}")
    return str(answer).strip()


class Number:
    r"""GSM8K's way: the number of the last '####' or \boxed{}."""

    def reference(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        text = _text(row["answer"])
        answer = after_hashes(text) or text
        if quantity(answer, words=True) is None:
            raise ValueError("the reference answer neither ends in '#### <number>' nor is a number")
        return answer, {}

    def reward(self, prompt: Prompt, text: str) -> float:
        given, wanted = final_number(text), quantity(prompt.answer, words=True)
        return float(given is not None and wanted is not None and given.equals(wanted))


class Mathematics:
    r"""The last \boxed{} or 'Answer:' line, equal as mathematics (grading.py)."""

    def __init__(self) -> None:
        symbolic.shared.start()

    def reference(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return _text(row["answer"]), {}

    def reward(self, prompt: Prompt, text: str) -> float:
        given = final_answer(text)
        return float(given is not None and same_answer(given, prompt.answer))


class Choice:
    """One of several options, named by its letter or by its text. The answer is a letter; with `choices` in the row it may be
    the place of one from 0 on, its label, or its text."""

    def reference(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        options, labels = _options(row.get("choices"))
        answer = row["answer"]
        if isinstance(answer, int) and not isinstance(answer, bool):
            if not 0 <= answer < len(options):
                raise ValueError(f"the reference answer is option {answer}, counted from 0, of {len(options)} choices")
            return LETTERS[answer], {"choices": options}
        text = _text(answer)
        if text in labels:
            return LETTERS[labels.index(text)], {"choices": options}
        if (letter := _letter(text)) is not None and (not options or LETTERS.index(letter) < len(options)):
            return letter, {"choices": options}
        places = [index for index, option in enumerate(options) if _folded(option) == _folded(text)]
        if len(places) != 1:
            told = f"none of the {len(options)} choices" if options else "no letter, and there are no `choices`"
            raise ValueError(f"the reference answer {text[:40]!r} is {told}")
        return LETTERS[places[0]], {"choices": options}

    def reward(self, prompt: Prompt, text: str) -> float:
        given = final_answer(text)
        if given is None:  # without a mark the response is the answer or none: a line of reasoning may begin with a letter
            given = text.strip() if "\n" not in text.strip() else ""
        letter = _letter(unwrapped(given)) or _letter(given)
        if letter is None:
            options = [_folded(option) for option in prompt.info["choices"]]
            told = _folded(unwrapped(given)).rstrip(".")
            letter = LETTERS[options.index(told)] if options.count(told) == 1 else None
        return float(letter == prompt.answer)


class Exact:
    """The same text, but for white space and Unicode's forms: the whole response, or what its last box or 'Answer:' line holds.
    Several answers in a list are all right."""

    def reference(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        given = row["answer"]
        if isinstance(given, list) and not given:
            raise ValueError("the list of reference answers is empty")
        return json.dumps([_spaced(_text(answer)) for answer in (given if isinstance(given, list) else [given])]), {}

    def reward(self, prompt: Prompt, text: str) -> float:
        allowed = json.loads(prompt.answer)
        marked = final_answer(text)
        return float(_spaced(text) in allowed or (marked is not None and _spaced(marked) in allowed))


GRADERS: dict[str, type[Grader]] = {
    "number": Number,
    "math": Mathematics,
    "choice": Choice,
    "exact": Exact,
    "code": UnitTests,
}


def names() -> tuple[str, ...]:
    return tuple(GRADERS)


def listed(choices: Any) -> str:
    """The options as lines of a prompt: `A. Paris`."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, _options(choices)[0], strict=False))


def _options(choices: Any) -> tuple[list[str], list[str]]:
    """(texts, labels) of a list of texts, or of {"text": [..], "label": [..]}; labels are [] where there are none."""
    labels: Any = []
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label") or []
    if choices is None:
        return [], []
    for column in (choices, labels):
        if not isinstance(column, list) or not all(isinstance(entry, str) for entry in column):
            raise TypeError("`choices` must be a list of strings")
    if not 2 <= len(choices) <= len(LETTERS) or len(labels) not in (0, len(choices)):
        raise ValueError(f"{len(choices)} choices with {len(labels)} labels; 2 to {len(LETTERS)} can be told apart")
    return choices, labels


def _letter(text: str) -> str | None:
    """`B`, `(B)`, `B. Paris`, `**B**`, `option B`; None for words, also for one that is a letter (`A dog`), and for several."""
    found = _LETTER.match(text.strip())
    if found is None:
        return None
    return found[1].upper() if not re.search(r"(?:,|\band\b|\bor\b|&|/)\W*[A-Z]\b\W*$", text[found.end(1) :]) else None


def _folded(text: str) -> str:
    return _spaced(text).casefold()


def _spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
