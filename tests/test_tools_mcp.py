"""MCP servers as tools: a real server process, its tools called as a model calls them, and everything that it may do wrong."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from runner.errors import UserError
from runner.tools import mcp as servers
from runner.turns.failure import Failed
from runner.turns.tools import ToolEnvironment

installed = pytest.mark.skipif(
    servers.importlib.util.find_spec("mcp") is None, reason="the mcp package is not installed: pip install 'runner[mcp]'"
)
SERVER = str(Path(__file__).with_name("mcp_server.py"))
COMMAND = {"command": [sys.executable, SERVER]}


@pytest.fixture(autouse=True)
def no_server_is_left() -> Iterator[None]:
    yield
    servers.close_all()
    left = [child for child in psutil.Process().children(recursive=True) if SERVER in " ".join(child.cmdline())]
    assert left == []


def step(environment: ToolEnvironment, name: str, arguments: str = "{}") -> tuple[Any, bool, dict[str, Any]]:
    text = f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
    return asyncio.run(environment.step(text))


@installed
def test_a_servers_tools_are_called_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_SECRET", "password")
    mcp = {"tests": COMMAND | {"timeout_seconds": 5, "env": {"GIVEN": "!"}}}
    assert list(ToolEnvironment.check_arguments(["calculator"], mcp=mcp)) == []
    environment, other = ToolEnvironment(["calculator"], mcp=mcp), ToolEnvironment(mcp=mcp)
    assert {"calculator", "add", "picture"} <= set(environment.tools)
    assert environment.tools["add"].server is other.tools["add"].server  # type: ignore[attr-defined]
    assert step(environment, "add", '{"a": 3}')[0] == "13" and step(environment, "add", '{"a": 3, "b": 4}')[0] == "7"
    assert step(environment, "calculator", '{"expression": "2*3"}')[0] == "6"
    assert step(environment, "secret")[0] == "nothing!"  # the run's variables stay with the run
    seen, done, info = step(environment, "picture", '{"side": 8}')
    assert seen[0] == "a square:" and np.asarray(seen[1]).tolist() == [[[255, 0, 0]] * 8] * 8
    assert not done and info["tool_calls"] == 1 and info["tool_errors"] == 0
    flood, _, _ = step(environment, "floods")
    assert len(flood) < 4100 and flood.endswith("[cut]")


@installed
def test_wrong_calls_are_errors_that_the_model_sees() -> None:
    environment = ToolEnvironment(mcp={"tests": COMMAND})
    impatient = ToolEnvironment(mcp={"tests": COMMAND | {"timeout_seconds": 0.5}})
    for name, arguments, said in (
        ("add", "{}", "add takes a, b"),
        ("add", '{"a": 1, "c": 2}', "add takes a, b"),
        ("add", '{"a": "three"}', "error: "),
        ("fails", "{}", "Error executing tool fails"),
        ("damaged", "{}", "an image that cannot be shown"),
        ("sleeps", '{"seconds": 4}', "no answer within 0.5 s"),
        ("nothing", "{}", "there is no tool 'nothing'"),
    ):
        seen, done, info = step(impatient if name == "sleeps" else environment, name, arguments)
        assert said in seen and seen.startswith("error: ") and not done and info["tool_errors"] == 1, (name, seen)
    coder = ToolEnvironment(format="qwen", mcp={"tests": COMMAND})
    text = "<tool_call><function=add><parameter=a>5</parameter></function></tool_call>"
    assert asyncio.run(coder.step(text))[0] == "15"  # a text that is a number where the schema wants one


@installed
def test_a_server_that_dies_fails_its_conversations_and_is_started_again() -> None:
    mcp = {"tests": COMMAND}
    environment = ToolEnvironment(mcp=mcp)
    with pytest.raises(Failed, match="MCP server tests is gone") as caught:
        step(environment, "dies")
    assert caught.value.kind == "environment"
    with pytest.raises(Failed, match="is gone"):
        step(environment, "add", '{"a": 1}')
    assert step(ToolEnvironment(mcp=mcp), "add", '{"a": 1}')[0] == "11"


@installed
@pytest.mark.parametrize(
    ("configured", "said"),
    [
        ({"x": {"command": [sys.executable, "-c", "raise SystemExit('no licence')"]}}, "did not start: no licence"),
        ({"x": {"command": ["/no/such/program"]}}, "did not start"),
        ({"x": COMMAND | {"tools": ["add", "divide"]}}, "has no tool divide; it has add"),
        ({"x": {}}, "a command or an address"),
        ({"x": {"command": "python server.py"}}, "a command or an address"),
        ({"x": COMMAND | {"url": "http://127.0.0.1:1/mcp"}}, "a command or an address"),
        ({"x": COMMAND | {"timeout": 3}}, "no such key: timeout"),
        ({"x": COMMAND | {"timeout_seconds": 0}}, "not above 0"),
        ({"x": 3}, "no mapping"),
        (3, "no mapping"),
        ({"x": COMMAND, "y": COMMAND}, "two tools have the name 'add'"),
    ],
)
def test_what_is_wrong_with_a_server_is_said_before_the_run(configured: Any, said: str) -> None:
    found = list(ToolEnvironment.check_arguments([], mcp=configured))
    assert any(said in str(error) for error in found), found
    assert all(isinstance(error, UserError) and error.fix for error in found)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda name: None)
    (found,) = ToolEnvironment.check_arguments([], mcp={"tests": COMMAND})
    assert found.fix == "pip install 'runner[mcp]'"
