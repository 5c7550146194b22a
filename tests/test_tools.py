"""What a model may call: how calls are read, arithmetic that is never evaluated as code, and the sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UserError
from runner.tools.calculator import calculate
from runner.tools.calls import calls
from runner.tools.protocol import ToolError
from runner.tools.sandbox import PythonSandbox
from runner.turns.tools import ToolEnvironment

HERMES = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2*3"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*(3+4)", "14"),
        ("1/4", "0.25"),
        ("-3 // 2", "-2"),
        ("2**10 % 7", "2"),
        ("1,234 + 1", "1235"),
        ("0.1+0.2", "0.3"),
        ("6/3", "2"),
    ],
)
def test_arithmetic(text: str, value: str) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "1/0", "9**9**9", "2**100000", "(-8)**0.5", "__import__('os')", "(1).__class__", "[1]", "1 if 1 else 2", "1;2", "1e999",
     "x", "(" * 100 + ")" * 100, "1+" * 150 + "1", "'a'*10", "True+1", "f'{1}'"],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ToolError):
        calculate(text)


@given(st.text(max_size=300))
def test_any_text_is_a_value_or_an_error(text: str) -> None:
    with contextlib.suppress(ToolError):
        assert isinstance(calculate(text), str)


def test_calls_as_hermes_and_qwen_write_them() -> None:
    (call,) = calls(f"let me see {HERMES} so", "hermes")
    assert (call.name, call.arguments, call.error) == ("calculator", {"expression": "2*3"}, None)
    (openai,) = calls('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "hermes")
    assert openai.arguments == {"a": 1}
    (qwen,) = calls("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", "qwen")
    assert (qwen.name, qwen.arguments) == ("f", {"a": "1"})
    assert len(calls(HERMES * 3, "hermes")) == 3 and calls("no call", "hermes") == []
    for wrong in ("{", "[]", '{"name": 1}', '{"name": "f", "arguments": []}', "[" * 5000):
        assert calls(f"<tool_call>{wrong}</tool_call>", "hermes")[0].error
    assert calls("<tool_call>{}", "hermes")[0].error


def step(environment: ToolEnvironment, text: str) -> tuple[str, bool, dict[str, Any]]:
    return asyncio.run(environment.step(text))


def test_wrong_calls_are_answered_and_the_answer_is_what_has_no_call() -> None:
    environment = ToolEnvironment(["calculator"], error_penalty=0.5)
    assert step(environment, HERMES)[:2] == ("6", False)
    assert step(environment, "#### 6") == ("", True, {})
    for text, message in (
        ('<tool_call>{"name": "oracle", "arguments": {}}</tool_call>', "there is no tool 'oracle'"),
        ('<tool_call>{"name": "calculator", "arguments": {"x": 1}}</tool_call>', "calculator takes expression"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": "1/0"}}</tool_call>', "division by zero"),
        ("<tool_call>nonsense</tool_call>", "no JSON object"),
    ):
        observation, done, info = step(environment, text)
        assert message in observation and not done and info["penalties"] == {"tool_errors": -0.5}
    with pytest.raises(UserError, match="there is no tool 'oracle'"):
        ToolEnvironment(["oracle"])


# ---- the sandbox


def run(code: str, **limits: Any) -> str:
    return PythonSandbox(**({"seconds": 20.0} | limits)).call(code=code)


def test_code_prints_and_errors_are_shown() -> None:
    assert run("import math\nprint(math.comb(5, 2))") == "10\n"
    assert "ZeroDivisionError" in run("1/0") and "SyntaxError" in run("1 +")
    assert run("import os; print(sorted(os.environ))").find("PYTHONPATH") < 0


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
        "import os; os.setsid()",
        "import os; os.kill(os.getppid(), 9)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
        "bytearray(10**10)",
        "open('big', 'wb').write(b'x' * (64 << 20))",
    ],
)
def test_what_it_does_not_let_code_do(code: str) -> None:
    assert "Error" in run(code) and "unsafe" not in run(f"{code}\nprint('unsafe')")


def test_time_and_output_are_bounded_and_children_are_killed_with_it(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ToolError, match="did not end"):
        run("while True: pass", seconds=1.0)
    assert time.monotonic() - started < 15
    assert run("while True: print('x' * 1000)", output_characters=100).endswith("[cut]")
    pid_file = tmp_path / "pid"
    fork = f"pid = os.fork()\nif pid: open({str(pid_file)!r}, 'w').write(str(pid))"
    run(f"import os, time\n{fork}\nelse: os.close(1); os.close(2); time.sleep(300)")
    pid = int(pid_file.read_text())
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # dead, and not yet fetched by who took it over
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    raise AssertionError("the child outlived the sandbox")
