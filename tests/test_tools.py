"""What a model may call: how calls are read, arithmetic that is never evaluated as code, and the sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config import compose
from runner.errors import UserError
from runner.models.families.qwen3_vl import VisualTower
from runner.models.images import PlacedImage
from runner.tasks.protocol import Prompt
from runner.tools.calculator import calculate
from runner.tools.calls import calls
from runner.tools.protocol import ToolError
from runner.tools.sandbox import PythonSandbox
from runner.tools.zoom import Zoom
from runner.turns.conversations import user_code
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


# ---- a closer look


def looked_at(*pictures: np.ndarray) -> Zoom:
    zoom = Zoom(max_calls=2)
    zoom.begin(Prompt("p", "", (), "", {}, (), pictures))
    return zoom


def test_zoom_shows_a_part_of_an_image_at_full_size() -> None:
    first, second = np.zeros((40, 20, 3), np.uint8), np.arange(30 * 60 * 3, dtype=np.uint8).reshape(30, 60, 3)
    text, shown = looked_at(first, second).call(image=2, box=[500, 0, 1000, 400])
    assert np.array_equal(shown, second[:12, 30:]) and text == "image 2, [500, 0, 1000, 400]: "
    assert np.array_equal(
        looked_at(second).call(image="1", box="[500, 0, 1000, 400]")[1], shown
    )  # as Qwen3-Coder's format has it
    assert looked_at(first).call(image=1, box=[-5, -5, 5000, 5000])[1].shape == first.shape
    small = Prompt("p", "", (), "", {}, (PlacedImage(second, 0, VisualTower(8, 8, 1)),))
    zoom = Zoom()
    zoom.begin(small)  # a task that keeps no originals
    assert np.array_equal(zoom.call(image=1, box=[0, 0, 1000, 1000])[1], second)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"image": 3, "box": [0, 0, 9, 9]}, "there are 2 images"),
        ({"image": 0, "box": [0, 0, 9, 9]}, "there are 2 images"),
        ({"image": "one", "box": [0, 0, 9, 9]}, "no whole number"),
        ({"image": True, "box": [0, 0, 9, 9]}, "no whole number"),
        ({"image": 1, "box": [0, 0, 9]}, "four numbers"),
        ({"image": 1, "box": "[0, 0"}, "four numbers"),
        ({"image": 1, "box": {"x": 1}}, "four numbers"),
        ({"image": 1, "box": [0, 0, 0.5, 9]}, "no whole number"),
        ({"image": 1, "box": [0, 0, 1e400, 9]}, "no whole number"),
        ({"image": 1, "box": [500, 0, 400, 1000]}, "the box holds 0 x 40 pixels"),
    ],
)
def test_a_look_at_nothing_is_an_error_that_the_model_sees(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolError, match=re.escape(said)):
        looked_at(np.zeros((40, 20, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)).call(**arguments)


def test_looks_are_counted_by_conversation() -> None:
    zoom = looked_at(np.zeros((40, 20, 3), np.uint8))
    for _ in range(2):
        zoom.call(image=1, box=[0, 0, 1000, 1000])
    with pytest.raises(ToolError, match="no more than 2"):
        zoom.call(image=1, box=[0, 0, 1000, 1000])


def test_images_of_tools_are_images_of_the_observation() -> None:
    environment = ToolEnvironment(["zoom", "calculator"])
    prompt = Prompt("p", "", (), "", {}, (), (np.full((20, 20, 3), 7, np.uint8),))

    async def asked(text: str) -> tuple[Any, bool, dict[str, Any]]:
        await environment.reset(prompt)
        return await environment.step(text)

    call = '<tool_call>{"name": "zoom", "arguments": {"image": 1, "box": [0, 0, 500, 1000]}}</tool_call>'
    seen, done, info = asyncio.run(asked(call + HERMES))
    assert [part if isinstance(part, str) else part.shape for part in seen] == [
        "image 1, [0, 0, 500, 1000]: ", (20, 10, 3), "\n", "6"
    ]  # fmt: skip
    assert not done and info["tool_calls"] == 2 and info["tool_errors"] == 0
    assert asyncio.run(asked(HERMES + HERMES))[0] == "6\n6"


class Unfinished:
    """A tool without a call."""

    name, description, parameters = "unfinished", "", {}


class Refuses:
    """A tool that cannot be made."""

    def __init__(self) -> None:
        raise OSError("no such device")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tools": ["oracle"]}, "there is no tool 'oracle'"),
        ({"tools": ["calculator", "nowhere.Tool"]}, "cannot be imported"),
        ({"tools": [f"{__name__}.Refuses"]}, "cannot be made: OSError: no such device"),
        ({"tools": [f"{__name__}.Unfinished"]}, "has no call"),
        ({"tools": ["python"], "settings": {"python": {"minutes": 1}}}, "cannot be made"),
        ({"tools": ["calculator"], "settings": {"python": {}}}, "none of the tools"),
        ({"tools": ["calculator", "calculator"]}, "two tools have the name 'calculator'"),
        ({"tools": []}, "no list of tools"),
        ({"tools": "calculator"}, "no list of tools"),
        ({"tools": ["calculator"], "format": "xml"}, "no format of calls"),
        ({"tools": ["calculator"], "error_penalty": "much"}, "no number"),
    ],
)
def test_tools_are_looked_at_before_a_run(arguments: dict[str, Any], said: str) -> None:
    cfg = compose.load_config(["task=calculator"])
    values = {"environment": "runner.turns.tools.ToolEnvironment", "arguments": arguments}
    section = dataclasses.replace(cfg.task.rollout, **values)
    with pytest.raises(UserError) as caught:
        user_code(dataclasses.replace(cfg, task=dataclasses.replace(cfg.task, rollout=section)))
    assert said in str(caught.value)
