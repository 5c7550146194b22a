"""How far the maths graders agree with cases of known outcome: `python -m benchmarks.graders [FOLDER] [--show]`.

FOLDER holds the tests of math-verify as its source distribution carries them (`pip download --no-deps --no-binary math-verify
math-verify`, unpacked); they are read, not run. Each gives a reference, an answer and whether they are equal. The answer is put
into a box where it has none, as DAPO-Math asks models to do, and graded by `dapo_math`; beside it by math-verify itself with its
defaults. The second table has this project's own cases (tests/test_grading_*.py), which both graders must get right.

Without FOLDER the second table alone. `--show` lists what is graded otherwise than expected.
"""

from __future__ import annotations

import argparse
import ast
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.tasks.grading import final_answer
from tests.answers import dapo, gsm8k

Grade = Callable[[str, str], bool]  # (reference, text)
OUTCOMES = ("expected", "result")


@dataclass(frozen=True)
class Case:
    reference: str
    text: str
    right: bool
    place: str  # file:line


def published_cases(folder: Path) -> tuple[list[Case], int]:
    """(the cases of every parametrized (gold, pred, outcome) under `folder`, rows that are computed and so left out)."""
    found, left_out = [], 0
    for path in sorted(folder.rglob("test_*.py")):
        for names, row in _rows(ast.parse(path.read_text())):
            try:
                values = dict(zip(names, ast.literal_eval(row), strict=False))
            except ValueError:
                left_out += 1
                continue
            outcome = next((values[name] for name in OUTCOMES if name in values), None)
            if "gold" in values and isinstance(outcome, int) and values.get("strict") is not False:
                found.append(Case(values["gold"], values["pred"], bool(outcome), f"{path.name}:{row.lineno}"))
    return found, left_out


def _rows(tree: ast.Module) -> Iterator[tuple[list[str], ast.expr]]:
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.parametrize"):
            continue
        names, rows = node.args[:2]
        if isinstance(names, ast.Constant) and isinstance(names.value, str) and isinstance(rows, ast.List):
            split = [name.strip() for name in names.value.split(",")]
            if "gold" in split:
                yield from ((split, row) for row in rows.elts)


def own_cases() -> Iterator[tuple[str, Grade, Case]]:
    """(grader's name, grader, case) of this project's lists."""
    lists = importlib.import_module("tests.test_grading_dapo"), importlib.import_module("tests.test_grading_gsm8k")
    for module, name, grade in zip(lists, ("dapo", "gsm8k"), (dapo, gsm8k), strict=True):
        upper, form = name.upper(), {"dapo": "34", "gsm8k": "18"}[name]
        for text in getattr(module, f"{upper}_{form}"):
            yield name, grade, Case(form, text, True, module.__name__)
        for kind in ("RIGHT", "WRONG"):
            for reference, text in getattr(module, f"{upper}_{kind}"):
                yield name, grade, Case(reference, text, kind == "RIGHT", module.__name__)
    for grade, reference, text, right in importlib.import_module("tests.test_grading").MORE:
        yield grade.__name__, grade, Case(reference, text, right, "tests.test_grading")


def by_task(reference: str, text: str) -> bool:
    """`dapo_math` with a reference as data sets have it, without math delimiters, and an answer in a box."""
    plain = final_answer(reference) or reference.strip().strip("$").strip()
    return dapo(plain, text if final_answer(text) is not None else f"\\boxed{{{text}}}")


def by_math_verify(reference: str, text: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(parse(reference), parse(text)))


def in_math(reference: str, text: str) -> bool:
    """math-verify with a reference of a data set, which it wants between dollars."""
    return by_math_verify(f"${reference}$", text)


def tally(title: str, graded: list[tuple[Case, bool]], show: bool) -> None:
    right = [accepted for case, accepted in graded if case.right]
    wrong = [accepted for case, accepted in graded if not case.right]
    print(f"{title:38}{sum(right):4} of {len(right):3} right answers, {sum(wrong):3} of {len(wrong):3} wrong ones accepted")
    for case, accepted in graded if show else ():
        if accepted is not case.right:
            print(f"    {case.place}: {case.reference!r} {case.text[-60:]!r} is {'right' if case.right else 'wrong'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    if given.folder is not None:
        cases, left_out = published_cases(given.folder)
        print(f"{len(cases)} cases of math-verify's tests ({left_out} rows that are computed were left out)")
        for title, grade in (("dapo_math", by_task), ("math-verify, its defaults", by_math_verify)):
            tally(title, [(case, grade(case.reference, case.text)) for case in cases], given.show)
    own = list(own_cases())
    print(f"{len(own)} cases of this project's tests")
    for name in ("dapo", "gsm8k"):
        mine = [(grade, case) for grader, grade, case in own if grader == name]
        tally(f"{name}", [(case, grade(case.reference, case.text)) for grade, case in mine], given.show)
        tally(f"{name}: math-verify, its defaults", [(case, in_math(case.reference, case.text)) for _, case in mine], given.show)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
