"""Reading final answers out of model text and comparing them. Text is parsed, never evaluated."""

from __future__ import annotations

import re
from fractions import Fraction

_DECIMAL = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?\d+)/(\d+)")
_LATEX_FRACTION = re.compile(r"([+-]?)\\[dt]?frac(?:\{([+-]?\d+)\}\{(\d+)\}|(\d)(\d))")
_NOISE = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])|\$|~")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\{([^{}]*)\}")
_ANSWER_LINE = re.compile(r"answer\s*(?:is)?\s*:\s*([^\n]*)", re.IGNORECASE)
MAX_DIGITS = 60  # longer "numbers" are compared as text: turning them into integers takes quadratic time


def after_hashes(text: str) -> str | None:
    """What follows the last '####' on its line (GSM8K's mark), or None."""
    head, mark, tail = text.rpartition("####")
    return tail.split("\n", 1)[0].strip() if mark else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} with balanced braces, or None."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position].strip()
    return None


def answer_line(text: str) -> str | None:
    """What follows the last 'Answer:' on its line, or None."""
    found = _ANSWER_LINE.findall(text)
    return found[-1].strip() if found else None


def number(text: str) -> Fraction | None:
    """An integer, decimal, a/b or LaTeX fraction, with thousands commas, `$` and a unit-free `%` allowed; else None."""
    text = normal_form(text)
    if len(text) > MAX_DIGITS:
        return None
    if match := _LATEX_FRACTION.fullmatch(text):
        sign, top, bottom, short_top, short_bottom = match.groups()
        numerator, denominator = int(top or short_top), int(bottom or short_bottom)
        return Fraction(-numerator if sign == "-" else numerator, denominator) if denominator else None
    if match := _FRACTION.fullmatch(text):
        return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    if any(character.isdigit() for character in text) and text.isascii() and _DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", ""))
    return None


def normal_form(text: str) -> str:
    """The text without LaTeX spacing, `$`, `%`, text wrappers, blanks and a final full stop; for comparing answers."""
    text = _TEXT.sub(r"\1", _NOISE.sub("", text)).replace("\\%", "").replace("%", "")
    text = "".join(text.split()).removesuffix(".")
    while text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    return text


def same_answer(given: str, reference: str) -> bool:
    """Equal as rational numbers where both are numbers, else equal in normal form (and not empty)."""
    left, right = number(given), number(reference)
    if left is not None and right is not None:
        return left == right
    return bool(normal_form(given)) and normal_form(given) == normal_form(reference)
