"""Whether two LaTeX answers are equal as mathematics, asked of math-verify in a process of its own.

A comparison has a limit of processor time, of wall time and of memory, and what exceeds one counts as not equal: the process is
ended and started again. So the caller's thread is never stuck, and nothing that sympy does can reach this process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO

WORKER = Path(__file__).with_name("symbolic_worker.py")
START_SECONDS = 120.0  # importing sympy on a busy machine
WALL_SECONDS = 5.0  # of one comparison; on a machine that is not overloaded its processor time ends it before
MAX_LENGTH = 400  # characters of an answer that is looked at
REMEMBERED = 8192  # answers of a group repeat each other

# Work left undone, or more than any grader should do: towers of powers, huge exponents and factorials
_UNDONE = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|det|max|min|sup|inf|gcd|lcm|bmod|pmod|mod)(?![a-zA-Z])")
# What math-verify drops: a number's base, primes, transposition; it folds the case of letters, and reads names as products
_BASE = re.compile(r"(?<=\d)\s*_\s*(?:\{\s*(\w+)\s*\}|(\w))")
_MARKS = re.compile(r"'|\\prime(?![a-zA-Z])|\^\s*\{?\s*T\s*\}?")
_NAMES = re.compile(r"\\(?:partial|angle)(?![a-zA-Z])|\\frac\s*\{\s*d\s*[a-z]?\s*\}\s*\{\s*d")
_WORDS = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*\{[^{}]*\}")
_LETTER = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]")
_CHOICES = tuple("ABCDEFGH")
_HUGE = re.compile(r"\^\s*\{?\s*-?\d{4,}|\d{4,}\s*!|!\s*!|\^\s*\{?[^{}\s]*\^|\d{60,}")


class Symbolic:
    """One worker process, started when it is first needed. Calls from several threads wait for each other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ready = False
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()

    def start(self) -> None:
        """Begin to start the process, without waiting for it."""
        with self._lock:
            self._ensure()

    def equal(self, given: str, reference: str) -> bool:
        """False too for what math-verify cannot read, for what takes too long and for work that was left undone."""
        if not _worth_asking(given, reference):
            return False
        key = given, reference
        with self._lock:
            if key not in self._known:
                self._known[key] = self._ask(given, reference)
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            return self._known[key]

    def close(self) -> None:
        """End the process; a later question starts another one."""
        with self._lock:
            self._end()

    def _ask(self, given: str, reference: str) -> bool:
        process = self._started()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([given, reference]) + "\n")
            process.stdin.flush()
            line = _line(process, process.stdout, WALL_SECONDS)
        except OSError:  # it died between two questions
            line = None
        except BaseException:  # this thread was told to give up: the answer that is on its way belongs to no later question
            self._end()
            raise
        if line is None:
            self._end()
            self._ensure()  # it imports sympy while other answers are graded
            return False
        return line.strip() == "true"

    def _started(self) -> subprocess.Popen[str]:
        """The process, ready for a question. A thread that is told to give up here leaves it to start."""
        process = self._ensure()
        assert process.stdout is not None
        if not self._ready:
            if _line(process, process.stdout, START_SECONDS) is None:
                self._end()
                raise RuntimeError("the process that compares answers does not start: is math-verify installed?")
            self._ready = True
        return process

    def _ensure(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                errors="backslashreplace",
                start_new_session=True,  # Ctrl-C is the driver's to handle; the end of its input ends the worker
            )
        return self._process

    def _end(self) -> None:
        process, self._process, self._ready = self._process, None, False
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was still to be written has no reader any more
                        pipe.close()


def _line(process: subprocess.Popen[str], stream: IO[str], seconds: float) -> str | None:
    """The next line; None when the process ends, or is ended here after this long."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        return stream.readline() or None
    finally:
        timer.cancel()


def _worth_asking(given: str, reference: str) -> bool:
    if not given or not reference or max(len(given), len(reference)) > MAX_LENGTH:
        return False
    if _UNDONE.search(given) and not _UNDONE.search(reference):
        return False
    if any(pattern.search(text) for pattern in (_HUGE, _NAMES) for text in (given, reference)):
        return False
    return _same_marks(given, reference) and not _differ_in_case(given, reference)


def _same_marks(given: str, reference: str) -> bool:
    """Whether bases, primes and transpositions agree; a name before `=` has none to compare, and a base may be left out."""
    found, wanted = (text.rpartition("=")[2] for text in (given, reference))
    bases, wanted_bases = ({first or second for first, second in _BASE.findall(text)} - {"10"} for text in (found, wanted))
    marks, wanted_marks = (sorted(re.sub(r"[\s{}]", "", mark) for mark in _MARKS.findall(text)) for text in (found, wanted))
    return marks == wanted_marks and bases in (set(), wanted_bases)


def _differ_in_case(given: str, reference: str) -> bool:
    r"""Whether one has `x` or `\pi` where the other has `X` or `\Pi`; `b` may stand for the choice `B`."""
    if reference in _CHOICES and given.upper() == reference:
        return False
    found, wanted = ({name.lstrip("\\") for name in _LETTER.findall(_WORDS.sub("", text))} for text in (given, reference))
    return any(name[0].swapcase() + name[1:] in wanted - found for name in found - wanted)


shared = Symbolic()  # of this process
atexit.register(shared.close)
