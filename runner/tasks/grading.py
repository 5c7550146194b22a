"""Finding final answers in model text and comparing them. Text is parsed, never evaluated.

Rules. A mark (`####`, `\\boxed{}`, an `Answer:` line) counts where an answer follows it; among several the last one counts, and
boxes that are joined by `and`, `or` or a comma are one answer. A sentence is read only where it holds a single number. What is
a number for both sides is compared exactly (runner/tasks/numbers.py); anything else as text in one form, then as mathematics
(runner/tasks/symbolic.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import zip_longest

from runner.tasks import symbolic
from runner.tasks.numbers import Quantity, quantity, unwrapped

MAX_ANSWER = 2000  # characters; a longer "answer" is compared as it stands
MAX_MARKS = 100  # the last ones of a text are looked at
_BOX = re.compile(r"\\f?boxed\s*(?=\{)|\\fbox\s*(?=\{)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"#{4,}")
_ANSWER_LINE = re.compile(
    r"(?:answer|\u7b54\u6848)\s*(?:is|\u662f)?\s*(?:\*\*|__|\*|_)?\s*[:\uff1a=]\s*(?:\*\*|__|\*|_)?[ \t]*([^\n]*)", re.IGNORECASE
)
_ANSWER_SENTENCE = re.compile(r"answer(?:\s+to\s[^.\n]{0,80})?\s+(?:(?:is|are)\s+|(?=\$|\\[(\[]))([^\n]+)", re.IGNORECASE)
_PREFIX = re.compile(
    r"^\W*(?:(?:so|thus|therefore|hence|and)\b,?\s*)*(?:the\s+)?(?:(?:final|correct|total|result|answer|solution|value|sum)\b[\s*_]*)+"
    r"(?:is|are|was|equals|[:=\uff1a])+[\s*_]*",
    re.IGNORECASE,
)
_CONNECTIVE = re.compile(r"^\W*(?:so|thus|therefore|hence)\b,?\s*", re.IGNORECASE)
_LIST_NUMBER = re.compile(r"^\W*\d{1,2}[.)]\s+[^\W\d]")
_JOINT = re.compile(r"^[\s$\\()\[\]]*(?:(?:,|;|\b(?:and|or)\b|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\q?quad)[\s$\\()\[\]]*)+$")
_REMAINDER = re.compile(r"\s*\\p?mod\s*\{\s*\d+\s*\}\s*$")
_SAID = re.compile(r"^\s*\\text\s*\{\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?\s*\}\s*", re.IGNORECASE)
_NUMBER_WORD = re.compile(
    r"(?<![\w.,])[-\u2212]?(?:\\?\$|[\u20ac\u00a3])?\s?(?:\d+\s+\d+/\d+|\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?)(?:\s*\\?%)?"
)
_LABEL = re.compile(
    r"\b(?:step|part|case|problem|question|section|equation|eq|example|method|option|phase|stage|day|week|month|year|round|note|"
    r"line|case|solution|approach|figure|fig|table|no|number|item|claim|lemma|hour|page|exercise|grade|level)s?\W*$",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(?:not|or|than|least|most|below|above|under|between|wrong|incorrect|plus|minus|times|squared|cubed|factorial|half|about|"
    r"approximately|roughly|nearly|almost|maybe|perhaps|un(?:known|clear|sure)|cannot|hundred|thousand|million|billion|dozen)\b|n't\b",
    re.IGNORECASE,
)
_RETRACTED = re.compile(
    r"\b(?:no|wait|actually|sorry|apologi[sz]e|mistake|instead|rather|correction|but|however|oops)\b", re.IGNORECASE
)
_TAGS = re.compile(r"^</?[a-zA-Z]{1,12}>"), re.compile(r"(?:</?[a-zA-Z]{1,12}>|<\|\w{1,20}\|>)$")  # `<b>18</b>`, `18</s>`
MAX_TAGS = 4  # on each side
_LONE_BRACES = re.compile(r"\{([,;:=+*<>-])\}")  # `5{:}30`: only spacing
_SYNONYMS = {"varnothing": "emptyset", "leqslant": "leq", "geqslant": "geq", "le": "leq", "ge": "geq", "ne": "neq"}
_SYNONYM = re.compile(rf"\\({'|'.join(_SYNONYMS)})(?![a-zA-Z])")
_NAME = re.compile(r"^\s*(?:\\?[a-zA-Z]+(?:_\{?\w+\}?|\([a-z]\)|')?|\\text\s*\{[^{}]*\})\s*=\s*(?=[^=]+$)")
_SIDE_BY_SIDE = re.compile(r"\d\s+[\d.]|\d\s*,\s+\d{3}(?!\d)")  # two numbers that a reader of LaTeX would join or multiply


def after_hashes(text: str) -> str | None:
    """What follows the last '####' that an answer follows (GSM8K's mark), or None. Headings are no answers."""
    found = list(_hashed(text))
    return found[-1][1] if found else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} with balanced braces that holds something, or None."""
    found = list(_boxes(text))
    return found[-1][2] if found else None


def answer_line(text: str) -> str | None:
    """What follows the last 'Answer:' on its line, or on the next one that is not empty; None without one."""
    found = list(_answer_lines(text))
    return found[-1][1] if found else None


def final_number(text: str) -> Quantity | None:
    """GSM8K: the number of the last '####' or box. None without a mark, or where the last one holds no single number."""
    boxes = list(_boxes(text))
    candidates = list(_hashed(text))
    if boxes:
        candidates.append((boxes[-1][0], _joined(text, boxes) or ""))
    if candidates:
        return word_problem_number(max(candidates)[1])
    told = [
        said
        for line in _HASHES.split(text)[1:][-MAX_MARKS:]
        if (said := number_told(line.strip().partition("\n")[0])) is not None
    ]
    return quantity(told[-1]) if told else None


def final_answer(text: str) -> str | None:
    """DAPO-Math: the content of the last box, of boxes that belong together, or of an 'Answer:' line that comes later; without
    both, what a sentence says that the answer is. None without any."""
    boxes, lines = list(_boxes(text)), list(_answer_lines(text))
    if boxes:
        lines = [line for line in lines if line[0] >= boxes[-1][1] and not _is_prose(line[1])]
    if lines:
        place, line = lines[-1]
        inner = _joined(line, list(_boxes(line)))
        return _stated(line) if inner is None else inner
    if boxes:
        return _joined(text, boxes)
    sentences = _ANSWER_SENTENCE.findall(text)
    return _stated(_sentence(sentences[-1])) if sentences else None


def number_told(sentence: str) -> str | None:
    """The one number of a sentence like `Janet makes $18 a day.`; None where there are several, where it only numbers a step, or
    where the sentence says something else than that number."""
    plain = sentence.replace("$", " $") if sentence.count("$") == 1 else sentence.replace("$", "")
    found = list(_NUMBER_WORD.finditer(plain))
    words = re.findall(r"[^\W\d_]{2,}", sentence)
    if (
        len(found) != 1
        or len(words) < 2
        or _UNSURE.search(sentence)
        or _LIST_NUMBER.match(sentence)
        or set(sentence) & set("\\^=+*<>")
    ):
        return None
    told = found[0]
    before, after = plain[: told.start()], plain[told.end() :]
    if _LABEL.search(before) or re.search(r"[\w.]$", before) or re.match(r"\w", after) or re.search(r"\d", before + after):
        return None
    return told[0].strip() if quantity(told[0]) is not None else None


def number(text: str) -> Fraction | None:
    """An integer, decimal, fraction or mixed number, with thousands, currency, percent and degrees; else None."""
    found = quantity(text, units=False)
    return None if found is None else found.value


def word_problem_number(text: str) -> Quantity | None:
    """The one number of an answer to a word problem: units may follow, `x =` or `9 + 9 =` may stand before it."""
    found = quantity(text, words=True)
    if found is None and "=" in text:
        found = quantity(text.rpartition("=")[2], words=True)
    return found


def normal_form(text: str) -> str:
    """The text without LaTeX spacing, math delimiters, text wrappers, emphasis, blanks, `%`, degrees and a final full stop."""
    text = unwrapped(text)
    text = re.sub(r"\\%|%|\^\s*\{?\s*\\circ\s*\}?|[\u00b0]", "", text)
    text = re.sub(r"\\(?:cdot|times)(?![a-zA-Z])\s*", "*", text)
    text = _SYNONYM.sub(lambda match: f"\\{_SYNONYMS[match[1]]}", _LONE_BRACES.sub(r"\1", text))
    return re.sub(r"(?<!\d)\s+|\s+(?![\d.])", "", " ".join(text.split()))


def same_answer(given: str, reference: str, *, symbolic_too: bool = True) -> bool:
    """Equal as numbers where both are numbers; else equal as text in normal form (and not empty), or as mathematics."""
    if len(given) > MAX_ANSWER:
        return given.strip() == reference.strip()
    given = _SAID.sub("", _unboxed(given))
    wanted = quantity(reference, units=False)
    found = quantity(_REMAINDER.sub("", _NAME.sub("", given)))
    if wanted is not None and found is not None:
        return found.equals(wanted)
    left, right = normal_form(given), normal_form(reference)
    if left and (left == right or _same_words(left, right)):
        return True
    if wanted is None and found is not None and (named := quantity(reference)) is not None:
        return found.equals(named)  # `5 cm` for `5\text{ cm}`
    if not symbolic_too or _SIDE_BY_SIDE.search(given) or _words_only(left) != _words_only(right) or _words_only(right):
        return False
    return symbolic.shared.equal(given.strip(), reference.strip())


def _same_words(left: str, right: str) -> bool:
    """`Yes` and `yes`; letters of algebra keep their case."""
    if left.isalpha() and right.isalpha() and (len(right) > 2 or right.casefold() == "no"):
        return left.casefold() == right.casefold()
    return False


def _words_only(text: str) -> bool:
    """Whether this is a word and no formula: sympy would take it for a product of letters in any order."""
    return text.isalpha() and (len(text) > 3 or text.casefold() in ("yes", "no"))


def _unboxed(text: str) -> str:
    boxes = list(_boxes(text))
    if boxes and text[: boxes[0][0]].strip(" $*") == "" and text[boxes[-1][1] :].strip(" $*.") == "":
        return _joined(text, boxes) or text
    return text


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, content) of every box with balanced braces and a content, the innermost where one holds another."""
    marks = list(_BOX.finditer(text))
    closed = _closed_braces(text) if marks else {}
    for mark, following in zip_longest(marks, marks[1:]):
        end = closed.get(mark.end())
        if end is None or (following is not None and following.start() < end):
            continue
        if content := text[mark.end() + 1 : end].strip():
            yield mark.start(), end + 1, content


def _closed_braces(text: str) -> dict[int, int]:
    """Place of an opening brace -> place of the one that closes it; escaped braces do not count."""
    pairs, open_braces = dict[int, int](), list[int]()
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            pairs[open_braces.pop()] = match.start()
    return pairs


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str | None:
    """The last box, with those before it that only `and`, `or` or a comma parts from it; the same answer twice is one."""
    if not boxes:
        return None
    parts = [boxes[-1][2]]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        between = text[before[1] : after[0]]
        if len(between) > 40 or not _JOINT.match(between):
            break
        parts.append(before[2])
    return ", ".join(dict.fromkeys(reversed(parts)))


def _answer_lines(text: str) -> Iterator[tuple[int, str]]:
    for match in _ANSWER_LINE.finditer(text):
        line, place = _without_emphasis(match[1]), match.start()
        if not line.strip("$*_ \\[("):  # the answer stands on the next line
            line = _without_emphasis(_next_line(text, match.end()))
        if line and not _ANSWER_LINE.search(line):
            yield place, line


def _hashed(text: str) -> Iterator[tuple[int, str]]:
    """(place, what stands there) of every '####' that a number follows, on its line or alone on the next."""
    marks = list(_HASHES.finditer(text))[-MAX_MARKS:]
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        line, newline, rest = text[mark.end() : end].partition("\n")
        line = _without_emphasis(line)
        if not line or (_is_answer_heading(line) and word_problem_number(_next_line(rest, 0)) is not None):
            line = _without_emphasis(_next_line(rest, 0)) if newline else ""
            if word_problem_number(line) is None:
                continue
        named = _PREFIX.sub("", line)
        if named == line:
            named = _CONNECTIVE.sub("", line)
        if _starts_as_number(named) and not _LIST_NUMBER.match(named):
            yield mark.start(), named


def _next_line(text: str, start: int) -> str:
    for line in text[start:].split("\n"):
        if line.strip("$*_ \t\\[]"):
            return line.strip()
    return ""


def _is_answer_heading(line: str) -> bool:
    return re.fullmatch(r"\W*(?:the\s+)?(?:final\s+)?(?:answer|result|solution)\W*(?:is)?\W*", line, re.IGNORECASE) is not None


def _starts_as_number(text: str) -> bool:
    """Whether an attempt at a number begins here: digits after currency, brackets, LaTeX or `x =`; a heading does not."""
    start = re.sub(
        r"\\(?:boxed|fbox|text\w*|math\w+|d?t?frac|left|displaystyle)|US\$|USD|EUR|Rs\.?|[^\w]|^[a-z]\s*=", " ", text[:60]
    )
    return re.match(r"\s*_*\s*[\d\u00bc-\u00be\u2150-\u215e]", start) is not None


def _without_emphasis(line: str) -> str:
    line = line.strip()
    for tag in _TAGS * MAX_TAGS:
        line = tag.sub("", line).strip()
    for mark in ("**", "__"):
        if line.count(mark) % 2:  # its partner stands before the line
            line = line.removesuffix(mark) if line.endswith(mark) else line.removeprefix(mark)
    return line.strip()


def _is_prose(line: str) -> bool:
    """`see above`: words and nothing that could be an answer; one word may be one."""
    return re.fullmatch(r"[^\d\\$=^_{}]+", line) is not None and len(re.findall(r"[^\W\d_]{2,}", line)) > 1


def _stated(line: str) -> str:
    """The answer of a line: what is left without `the answer is`, or the one number of a sentence."""
    line = _PREFIX.sub("", line)
    told = number_told(line) if quantity(line) is None else None
    return _before_remark(line) if told is None else told


def _before_remark(line: str) -> str:
    r"""`$20\%$` of `$20\%$. I hope it is correct.`: without sentences that say nothing about the answer."""
    end = re.search(r"[.!?]\s+(?=[^\W\d_]|<)", line)
    if end is None or not re.search(r"[\d$\\]", line[: end.start()]):
        return line
    remark = line[end.end() :]
    return line if re.search(r"[\d$\\=]", remark) or _UNSURE.search(remark) or _RETRACTED.search(remark) else line[: end.start()]


def _sentence(text: str) -> str:
    """The answer of 'the answer is 34. I hope ..': up to the end of the sentence."""
    text = _PREFIX.sub("", text)
    end = re.search(r"[.!?](?:\s|$)", text)
    return (text[: end.start()] if end else text).strip(" :")
