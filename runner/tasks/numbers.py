"""Numbers as people and models write them, with units, read by a grammar: nothing is evaluated, nothing is guessed.

Two numbers side by side are never one: `3 4`, `1, 234` and `18 or 20` are no number. Thousands are grouped by a comma, LaTeX's
`{,}` or a thin space (`\\,`), in threes. A proper fraction after an integer is a mixed number: `5 1/2` is 11/2.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 60  # longer "numbers" are compared as text: turning them into integers takes quadratic time
MAX_LENGTH = 400  # of a text that is looked at
MAX_EXPONENT = 60
DEGREE = "degree"  # of angles and of temperatures: `12^\\circ` may be `12^\\circ\\text{C}`, and is no radian
RADIANS = {"rad", "radian"}
UNIT_WORDS = 12  # words after a number that may be its unit or a remark

_DASHES = dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"), "-")
_WIDE = {0xFEE0 + code: chr(code) for code in map(ord, "0123456789.,%/()$")}  # as Chinese and Japanese text has them
_THIN = "\u2009\u202f\u2006\u2008"
_GROUP_MARK = re.compile(rf"(?<=\d)(?:\{{,\}}|,?\\[,! ]|[{_THIN}]|\\thinspace ?)(?=\d{{3}}(?!\d))")
_SPACING = re.compile(
    r"\\(?:quad|qquad|thinspace|enspace|space)(?![a-zA-Z])|\\[hv]space\*?\s*\{[^{}]*\}|\\[,;:! ]|~|"
    r"[\u00a0\u2000-\u200f\u202f\u2060\u3000\ufe0f\ufeff\U0001f300-\U0001faff]"  # invisible characters and pictures
)
_CUT_SPACE = re.compile(r"(?<!\\)\\\s*(?=\$*[.\s]*$)")  # `\\ ` at the end of a text from which blanks were stripped
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits)(?![a-zA-Z])|\\[()\[\]]|\\(?=\$)|\$"
)
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_TEXT_COMMANDS = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname|emph|bm|boldsymbol|unit|rm)"
)
_TEXT = re.compile(_TEXT_COMMANDS + r"\s*\{([^{}]*)\}")
_OVER = re.compile(r"\{\s*([^{}]*?)\s*\\over(?![a-zA-Z])\s*([^{}]*?)\s*\}")
_EMPHASIS = ("***", "**", "__", "*", "_", "`", '"', "'", "\u201c", "\u201d", "\u2018", "\u2019")
_PERCENT = re.compile(r"\s*(?:\\?%|\bper\s?cent(?:age)?\b|\bpct\b\.?)\s*$", re.IGNORECASE)
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|\\circ|[\u00b0\u00ba]|\bdegrees?\b)\s*$", re.IGNORECASE)
_CURRENCY = r"(?:US\$|USD|EUR|GBP|INR|Rs\.?|[\u20ac\u00a3\u00a5\u20b9]|\\(?:euro|pounds)(?![a-zA-Z]))"
_LEADING = re.compile(
    rf"^(?:(?:=|\u2248|\\approx|:)\s*)?([+-]?)\s*{_CURRENCY}?\s*([+-]?)\s*(?=[\d.\\({{]|[\u00bc-\u00be\u2150-\u215e])"
)

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[+-]?\s*{_DECIMAL}"
_ARGUMENT = rf"(?:\{{\s*({_SIGNED})\s*\}}|(\d))"
_LATEX_FRACTION = rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}"
_TERM = rf"(?:\(\s*({_SIGNED})\s*\)|({_DECIMAL}))"
_PLAIN_FRACTION = rf"{_TERM}\s*/\s*(?:{_TERM}|([+-]\s*{_DECIMAL}))"
_POWER_OF_TEN = r"10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?\d{1,3})\s*\}|\(\s*([+-]?\d{1,3})\s*\)|([+-]?\d{1,3}))"
_FORMS = {
    "decimal": re.compile(rf"({_DECIMAL})"),
    "repeating": re.compile(rf"({_INTEGER}\.\d*|\.\d*)\\(?:overline|bar)\s*\{{\s*(\d+)\s*\}}"),
    "exponent": re.compile(rf"({_DECIMAL})[eE]([+-]?\d{{1,3}})"),
    "scientific": re.compile(rf"(?:({_DECIMAL})\s*(?:\\times|\\cdot|[*x])\s*)?{_POWER_OF_TEN}"),
    "plain_fraction": re.compile(_PLAIN_FRACTION),
    "latex_fraction": re.compile(_LATEX_FRACTION),
    "mixed_plain": re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)"),
    "mixed_latex": re.compile(rf"(\d+)\s*{_LATEX_FRACTION}"),
}
_SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
_SCALE = re.compile(rf"\s*\b({'|'.join(_SCALES)})s?\b\s*$", re.IGNORECASE)
# What a unit may look like: words, their powers, `per` and `/`; no digit but an exponent's
_UNIT_WORD = r"(?:[^\W\d_]+(?:['\u2019][a-z]*)?\.?(?:\s*\^\s*\{?\s*[23]\s*\}?|[\u00b2\u00b3]|(?<=m)[23])?)"
_UNIT_TAIL = re.compile(
    rf"(?P<gap>\s*[,/(]?\s*|-|\s+[-\u2014]+\s+(?=[a-z]{{3}}))"
    rf"(?P<words>{_UNIT_WORD}(?:[\s,/*\u00b7()-]+{_UNIT_WORD})*)[\s.)!]*$"
)
# words that make another number of the one before them, or another claim of it
_NO_UNIT = re.compile(
    r"or|not|plus|minus|times|over|squared|cubed|sqrt|pi|e|i|sin|cos|tan|log|ln|exp|mod|to|wrong|incorrect|than|less|least|most|"
    r"below|above|under|between|divided|factorial|choose|root|half|halves|thirds?|quarters?|tenths|hundredths|hundreds?|"
    r"thousands?|millions?|billions?|trillions?|dozens?",
    re.IGNORECASE,
)
_GLUED_UNIT = re.compile(
    r"[ckm]?m|[km]?g|[cdm]?l|lbs?|oz|ft|in|yd|mi|hrs?|h|mins?|secs?|m?s|mph|kp?mh|kph|rpm|usd|eur|gbp|cents|units?|sq|hours|"
    r"minutes|seconds|days|years|apples|st|nd|rd|th|deg|am|pm",
    re.IGNORECASE,
)
_ONE_LETTER_UNIT = re.compile(r"[mglhs]", re.IGNORECASE)  # glued to a number a unit in a word problem, a variable in algebra


@dataclass(frozen=True)
class Quantity:
    """A number with what stood behind it: `percent` where it was a share of 100, `unit` in lower case, "" without one."""

    value: Fraction
    percent: bool = False
    unit: str = ""
    decimals: int | None = None  # digits after the point; None where it was not written as a decimal

    def equals(self, reference: Quantity) -> bool:
        """The same number: exactly, as a percentage of the same share, or a fraction that no decimal ends, right to six decimals
        or more. A unit that only one of them names is no difference."""
        units = {self.unit, reference.unit} - {""}
        if len(units) == 2 and (DEGREE not in units or units & RADIANS):
            return False
        if self.value == reference.value:
            return True
        if self.percent != reference.percent:
            share, plain = (self, reference) if self.percent else (reference, self)
            return share.value / 100 == plain.value
        endless = _endless(reference.value.denominator)
        return bool(endless and (self.decimals or 0) >= 6 and round(reference.value, self.decimals or 0) == self.value)


def quantity(text: str, *, units: bool = True, words: bool = False) -> Quantity | None:
    """The one number that `text` is, or None.

    units: a unit or remark may follow (`18 apples`, `34\\text{ cm}^2`). words: so may one letter glued to it (`18m`), which is a
    variable in algebra.
    """
    if len(text) > MAX_LENGTH:
        return None
    body = unwrapped(text)
    body, percent = _cut(body, _PERCENT)
    body, degrees = _cut(body, _DEGREES)
    found = _number(body)
    if found is None and units:
        found = _with_unit(_text_groups_open(text), words)
    if found is None:
        return None
    value, unit, decimals = found
    return Quantity(value, percent, DEGREE if degrees else unit, decimals)


def unwrapped(text: str) -> str:
    r"""The text in one form: without math delimiters, LaTeX spacing, emphasis, outer braces, `x =` and a final full stop."""
    text = _TEXT.sub(r"\1", _plain(text))
    return _peeled(text)


def _plain(text: str) -> str:
    text = _CUT_SPACE.sub("", text.translate(_DASHES | _WIDE))
    text = _GROUP_MARK.sub(",", text)
    text = text.replace("\u00d7", r"\times ").replace("\u22c5", r"\cdot ").replace("\u00b7", r"\cdot ")
    text = _LAYOUT.sub("", _FRACTION_NAMES.sub(r"\\frac", text))
    text = _OVER.sub(r"\\frac{\1}{\2}", _SPACING.sub(" ", text))
    return text.strip()


def _peeled(text: str) -> str:
    before = None
    while text != before:
        before = text
        text = re.sub(r"^\s*\\?boxed\s*(?=\{)", "", text).strip().rstrip(".,;:").strip()
        for mark in _EMPHASIS:
            if mark == "'" and not text.startswith(mark):  # `x'` has a prime
                continue
            text = text.removeprefix(mark).removesuffix(mark)
        for opening, closing in ("{}", "()"):
            if text.startswith(opening) and _closes_at_end(text, opening, closing):
                text = text[1:-1]
    return text


def _closes_at_end(text: str, opening: str, closing: str) -> bool:
    """Whether the first bracket is closed by the last character and by none before it."""
    depth = 0
    for place, character in enumerate(text):
        if character == opening:
            depth += 1
        elif character == closing:
            depth -= 1
            if depth == 0:
                return place == len(text) - 1
    return False


def _cut(text: str, pattern: re.Pattern[str]) -> tuple[str, bool]:
    match = pattern.search(text)
    return (text[: match.start()].strip(), True) if match and match.start() else (text, False)


def _number(text: str) -> tuple[Fraction, str, int | None] | None:
    """(value, scale word's "", decimals) of a text that is a number and nothing else."""
    text, scaled = _scale(_peeled(text))
    start = _LEADING.match(text)
    if start is None or (start[1] and start[2]) or len(text) > MAX_DIGITS:
        return None
    negative = "-" in (start[1], start[2])
    body = _peeled(re.sub(rf"\s*(?:{_CURRENCY})$", "", text[start.end() :]))
    inner = re.match(r"([+-])\s*", body)  # (-18)
    if inner and not (start[1] or start[2]):
        negative, body = inner[1] == "-", body[inner.end() :]
    value = _value(body)
    if value is None:
        return None
    number = value * scaled
    point = body.rfind(".")
    decimals = len(body) - point - 1 if point >= 0 and body[point + 1 :].isdigit() and scaled == 1 else None
    return (-number if negative else number), "", decimals


def _scale(text: str) -> tuple[str, int]:
    match = _SCALE.search(text)
    return (text[: match.start()], _SCALES[match[1].lower()]) if match and match.start() else (text, 1)


def _value(body: str) -> Fraction | None:
    """An unsigned number in one of the known forms."""
    if not body.isascii():
        return _vulgar(body)
    for name, form in _FORMS.items():
        if match := form.fullmatch(body):
            parts = [part for part in match.groups() if part is not None]
            return _READ[name](parts)
    return None


def _vulgar(body: str) -> Fraction | None:
    """`3\u00bd` and `\u00bd`."""
    head, last = body[:-1].strip(), body[-1:]
    if (
        unicodedata.category(last) != "No"
        or not 0 < unicodedata.numeric(last, 0) < 1
        or (head and not re.fullmatch(r"\d+", head))
    ):
        return None
    return Fraction(unicodedata.numeric(last)).limit_denominator(10) + int(head or 0)


def _decimal(text: str) -> Fraction:
    return Fraction("".join(text.split()).replace(",", "").rstrip("."))


def _ratio(top: str, bottom: str) -> Fraction | None:
    denominator = _decimal(bottom)
    return _decimal(top) / denominator if denominator else None


def _repeating(start: str, period: str) -> Fraction:
    r"""0.1\overline{6} is 1/6."""
    shift = len(start) - start.index(".") - 1
    return _decimal(f"0{start}0") + Fraction(int(period), 10**shift * (10 ** len(period) - 1))


def _power(mantissa: str, exponent: str) -> Fraction | None:
    return _decimal(mantissa) * Fraction(10) ** int(exponent) if abs(int(exponent)) <= MAX_EXPONENT else None


def _mixed(whole: str, top: str, bottom: str) -> Fraction | None:
    """5 1/2; not 5 3/2, which nobody writes for 13/2."""
    part = _ratio(top, bottom)
    return None if part is None or not 0 < part < 1 else int(whole) + part


_READ = {
    "decimal": lambda parts: _decimal(parts[0]),
    "repeating": lambda parts: _repeating(*parts),
    "exponent": lambda parts: _power(*parts),
    "scientific": lambda parts: _power(*(parts if len(parts) == 2 else ["1", *parts])),
    "plain_fraction": lambda parts: _ratio(*parts),
    "latex_fraction": lambda parts: _ratio(*parts),
    "mixed_plain": lambda parts: _mixed(*parts),
    "mixed_latex": lambda parts: _mixed(*parts),
}


def _text_groups_open(text: str) -> str:
    r"""`34\text{cm}^2` as `34 cm^2`, so that what LaTeX calls text is a word of its own."""
    return _peeled(_TEXT.sub(r" \1 ", _plain(text)).replace("} ^", "}^"))


def _with_unit(text: str, words: bool) -> tuple[Fraction, str, int | None] | None:
    text = re.sub(r"\s+\^", "^", text)
    for place in range(1, len(text)):  # the first letter that may begin a unit
        if not text[place].isalpha() or text[place - 1].isalpha() or text[place - 1] == "\\":
            continue
        match = _UNIT_TAIL.match(text, _before(text, place))
        if match is None:
            continue
        names = re.findall(r"[^\W\d_\u00b2\u00b3]+", match["words"])
        glued = not match["gap"]
        if len(names) > UNIT_WORDS or any(_NO_UNIT.fullmatch(name) for name in names):
            continue
        if glued and (not _GLUED_UNIT.fullmatch(names[0]) or (_ONE_LETTER_UNIT.fullmatch(names[0]) and not words)):
            continue
        if not words and any(len(name) == 1 for name in names) and not match["words"].isupper() and glued:
            continue
        head, percent_like = text[: match.start()], _PERCENT.search(text[: match.start()])
        found = _number(_PERCENT.sub("", head) if percent_like else head)
        if found is not None:
            return found[0], _unit_name(match["words"]), found[2]
    return None


def _before(text: str, place: int) -> int:
    """Where the gap before a unit begins."""
    while place and text[place - 1] in " -\u2014,/(":
        place -= 1
    return place


def _unit_name(words: str) -> str:
    name = re.sub(r"[\s{}.^]+", " ", words.lower().replace("\u00b2", "^2").replace("\u00b3", "^3")).strip()
    return name if len(name) < 5 else re.sub(r"(?<=[a-z])(?:es|s)\b", "", name)


def _endless(denominator: int) -> bool:
    """Whether a fraction with this denominator has infinitely many decimals."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator != 1
