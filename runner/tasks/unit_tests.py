"""Code that a model writes, run against unit tests in the sandbox of runner/tools (what that guards against stands there).

The last fenced block of Python in a response is the program. Its tests are what the row's `answer` holds, or the text of it as
JSON:

    "assert f(1) == 2" or ["assert f(1) == 2", ..]          Python that raises where the program is wrong
    {"inputs": ["1 2\\n", ..], "outputs": ["3\\n", ..]}     what it reads and prints
    {"inputs": [[1, 2], ..], "outputs": [3, ..], "fn_name": "add"}   arguments and values of a function, or of Solution's method

The reward is 1 where every test passes, else 0. Expected outputs never enter the sandbox: what came back is compared here. Of
asserts the program is a neighbour, and one that is out to deceive can return values that are equal to everything.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from typing import Any

from runner.tasks.protocol import Prompt
from runner.tools.protocol import ToolError
from runner.tools.sandbox import PythonSandbox

MAX_TESTS = 200  # of a problem: each of those with inputs is a process of its own
MAX_OUTPUT = 1 << 20  # characters that a program may print
_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE)

# Ahead of the program; repr of its text follows. Standard input is made there because the sandbox's own carries the code.
_WITH_INPUT = """import io, sys
sys.stdin = io.TextIOWrapper(io.BytesIO({given!r}.encode()), encoding="utf-8")
exec(compile({program!r}, "program.py", "exec"), {{"__name__": "__main__"}})
"""
_ASSERTS = """space = {{"__name__": "program"}}
exec(compile({program!r}, "program.py", "exec"), space)
for test in {tests!r}:
    exec(compile(test, "tests.py", "exec"), space)
import sys
sys.__stdout__.write("\\n" + {nonce!r})
"""
_CALL = """import json, sys
space = {{"__name__": "program"}}
exec(compile({program!r}, "program.py", "exec"), space)
name = {name!r}
found = space[name] if name in space else getattr(space["Solution"](), name)
value = found(*json.loads({given!r}))
sys.__stdout__.write("\\n" + {nonce!r} + json.dumps(value))
"""


class UnitTests:
    def __init__(self, seconds: float = 4.0, memory_mib: int = 512) -> None:
        """Limits of each test. UserError on a machine that has no sandbox."""
        self.sandbox = PythonSandbox(seconds, memory_mib, MAX_OUTPUT)

    def reference(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return json.dumps(_tests(row["answer"])), {}

    def reward(self, prompt: Prompt, text: str) -> float:
        blocks = _FENCE.findall(text)
        if not blocks:
            return 0.0
        tests, program = json.loads(prompt.answer), blocks[-1]
        if "asserts" in tests:
            nonce = secrets.token_hex(16)
            printed = self._run(_ASSERTS.format(program=program, tests=tests["asserts"], nonce=nonce))
            return float(printed is not None and printed.endswith("\n" + nonce))
        passes = self._calls if tests.get("fn_name") else self._prints
        return float(
            all(passes(program, tests, given, wanted) for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True))
        )

    def _prints(self, program: str, tests: dict[str, Any], given: str, wanted: str) -> bool:
        printed = self._run(_WITH_INPUT.format(program=program, given=given))
        return printed is not None and _lines(printed) == _lines(wanted)

    def _calls(self, program: str, tests: dict[str, Any], given: list[Any], wanted: Any) -> bool:
        nonce = secrets.token_hex(16)
        code = _CALL.format(program=program, name=tests["fn_name"], given=json.dumps(given), nonce=nonce)
        _, mark, value = (self._run(code) or "").rpartition("\n" + nonce)
        try:
            return bool(mark) and _same(json.loads(value), wanted)
        except ValueError:
            return False

    def _run(self, code: str) -> str | None:
        """What it printed; None where it ran out of time, or is too long."""
        try:
            return self.sandbox.call(code=code)
        except ToolError:
            return None


def _lines(text: str) -> list[str]:
    """Lines without blanks at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same(value: Any, wanted: Any) -> bool:
    """Equal as JSON, where a tuple is a list; True is not 1."""
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_same, value, wanted))
    return type(value) is type(wanted) and bool(value == wanted) or _number(value) and _number(wanted) and bool(value == wanted)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tests(given: Any) -> dict[str, Any]:
    """{"asserts": [..]} or {"inputs": [..], "outputs": [..], "fn_name": name or None}. TypeError or ValueError for others."""
    if isinstance(given, str) and given.lstrip()[:1] in ("{", "["):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError("the unit tests begin like JSON and are none") from None
    asserts = [given] if isinstance(given, str) else given
    if isinstance(asserts, list):
        if not asserts or not all(isinstance(test, str) and test.strip() for test in asserts) or len(asserts) > MAX_TESTS:
            raise ValueError(f"the unit tests must be 1 to {MAX_TESTS} texts of Python")
        for test in asserts:
            try:
                ast.parse(test)
            except (SyntaxError, MemoryError) as error:  # the latter where it is nested too deeply
                raise ValueError(f"the unit test {test[:40]!r} is no Python: {error}") from None
        return {"asserts": asserts}
    if not isinstance(given, dict):
        raise TypeError(f"the unit tests must be Python, or inputs and outputs, not {type(given).__name__}")
    inputs, outputs, name = given.get("inputs"), given.get("outputs"), given.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError("the unit tests need as many `outputs` as `inputs`, one or more")
    if len(inputs) > MAX_TESTS:
        raise ValueError(f"{len(inputs)} unit tests, {MAX_TESTS} are allowed")
    kind: type = list if name else str
    if not all(isinstance(entry, kind) for entry in inputs) or not (name or all(isinstance(entry, str) for entry in outputs)):
        raise ValueError("`inputs` are lists of arguments where there is a `fn_name`, else texts, and so are `outputs`")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError("`fn_name` is no name of a function")
    return {"inputs": inputs, "outputs": outputs, "fn_name": name}
