"""A process that says whether two LaTeX answers are equal, with math-verify; started and ended by runner/tasks/symbolic.py.

It reads one JSON list [given, reference] per line and answers `true` or `false` per line. The kernel ends it when one
comparison takes too much processor time or memory: sympy spends most of both inside single C calls (`9^{9^9}`), which no
exception interrupts. Text goes through math-verify's LaTeX grammar alone; its reader of plain expressions, which calls `eval`,
is not used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys

CPU_SECONDS = 1.5  # of one comparison
MEMORY_BYTES = 4 << 30


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    reader = [LatexExtractionConfig(boxed_match_priority=0)]

    def equal(given: str, reference: str) -> bool:
        sides = [
            parse(f"\\boxed{{{text}}}", reader, fallback_mode="no_fallback", parsing_timeout=None) for text in (reference, given)
        ]
        return all(sides) and bool(verify(*sides, timeout_seconds=None))

    equal("\\frac{1}{2}", "0.5")  # what is imported on first use
    answer(True)
    for line in sys.stdin:
        given, reference = json.loads(line)
        deadline(CPU_SECONDS)
        try:
            result = equal(given, reference)
        except (Exception, RecursionError):
            result = False
        deadline(0)
        answer(result)


def deadline(seconds: float) -> None:
    """SIGPROF's default action ends the process after this much processor time, wherever it is; 0: never."""
    import signal

    signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(result: bool) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
