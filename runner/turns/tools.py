"""An environment that carries out tool calls; a turn without a call is the answer, which the task rewards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

from runner.errors import UserError, told
from runner.foreign import in_thread
from runner.tasks.protocol import Prompt
from runner.tools import mcp as mcp_servers
from runner.tools.calculator import Calculator
from runner.tools.calls import CLOSE, FORMATS, OPEN, calls
from runner.tools.protocol import Call, Tool, ToolError, ToolLost, required
from runner.tools.sandbox import PythonSandbox
from runner.tools.zoom import Zoom
from runner.turns.failure import Failed
from runner.turns.pictures import is_image, parts_of

TOOLS: dict[str, Callable[..., Tool]] = {"calculator": Calculator, "python": PythonSandbox, "zoom": Zoom}


class ToolEnvironment:
    """task.rollout.environment=runner.turns.tools.ToolEnvironment; its arguments:

    tools          names of TOOLS, or package.module.Class of the user's own
    mcp            servers whose tools there are as well, by name (runner/tools/mcp.py)
    settings       arguments of a tool by its name
    format         how calls are written (runner/tools/calls.py)
    error_penalty  taken from the reward for a call that cannot be carried out, as reward/tool_errors. The task's own reward is
                   reward/task beside it
    """

    def __init__(
        self,
        tools: list[str] | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
        format: str = "hermes",
        error_penalty: float = 0.0,
        mcp: dict[str, Any] | None = None,
    ) -> None:
        found: list[Tool] = [*_built(tools or [], settings or {}), *mcp_servers.tools(mcp or {})]
        self.tools = {tool.name: tool for tool in found}
        self.format, self.penalty = format, error_penalty

    @staticmethod
    def check_arguments(
        tools: list[str] | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
        format: str = "hermes",
        error_penalty: float = 0.0,
        mcp: dict[str, Any] | None = None,
    ) -> Iterator[UserError]:
        """What is wrong with the arguments, asked before a run begins: tools are made as conversations make them."""
        if format not in FORMATS:
            yield UserError(f"{format!r} is no format of calls", key=f"{KEY}.format", fix=f"{KEY}.format={' or '.join(FORMATS)}")
        if not isinstance(error_penalty, int | float):
            yield UserError(f"{error_penalty!r} is no number", key=f"{KEY}.error_penalty", fix=f"{KEY}.error_penalty=0")
        tools = [] if tools is None and mcp else tools
        if not isinstance(tools, list) or not (tools or mcp):
            yield UserError(f"{tools!r} is no list of tools", key=f"{KEY}.tools", fix=f"{KEY}.tools=[calculator]")
            return
        for name in (settings or {}).keys() - set(tools):
            yield UserError(
                f"there are settings of {name!r}, which is none of the tools", key=f"{KEY}.settings", fix=f"{KEY}.tools"
            )
        names: list[str] = []
        if mcp:
            problems = list(mcp_servers.check(mcp))
            yield from problems
            names = [] if problems else [tool.name for tool in mcp_servers.tools(mcp)]
        for name in tools:
            try:
                found = _built([name], settings or {})
            except UserError as error:
                yield error
                continue
            for tool in found:
                names.append(tool.name)
                _close(tool)
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield UserError(f"two tools have the name {name!r}", key=f"{KEY}.tools", fix="one of them")

    async def reset(self, prompt: Prompt) -> None:
        for tool in self.tools.values():
            if begin := getattr(tool, "begin", None):
                await in_thread(begin, prompt)

    async def close(self) -> None:
        for tool in self.tools.values():
            if hasattr(tool, "close"):
                await in_thread(_close, tool)

    async def step(self, response: str) -> tuple[Any, bool, dict[str, Any]]:
        found = calls(response, self.format)
        if not found:
            return "", True, {}
        results = await asyncio.gather(*(self._result(call) for call in found))
        wrong = sum(error for _, error in results)
        info: dict[str, Any] = {"calls": [call.name for call in found], "tool_calls": len(found), "tool_errors": wrong}
        if self.penalty and wrong:
            info["penalties"] = {"tool_errors": -self.penalty * wrong}
        return _joined([seen for seen, _ in results]), False, info

    async def _result(self, call: Call) -> tuple[list[Any], bool]:
        """(what the model sees, whether the call went wrong)."""
        if call.error is not None:
            return [f"error: {call.error}"], True
        tool = self.tools.get(call.name)
        if tool is None:
            return [f"error: there is no tool {call.name[:100]!r}; there are {', '.join(self.tools)}"], True
        arguments = call.arguments or {}
        if not required(tool) <= set(arguments) <= set(tool.parameters):
            return [f"error: {tool.name} takes {', '.join(tool.parameters)}"], True
        try:
            return _parts(await in_thread(lambda: tool.call(**arguments))), False
        except ToolLost as error:
            raise Failed("environment", str(error)) from None
        except ToolError as error:
            return [f"error: {error}"], True
        except Exception as error:
            return [f"error: {told(error)}"], True


KEY = "task.rollout.arguments"


def _built(names: list[str], settings: dict[str, dict[str, Any]]) -> list[Tool]:
    """The tools of these names. UserError for one that is not there, or that cannot be made."""
    from runner.turns.conversations import named

    built: list[Tool] = []
    for name in names:
        make = TOOLS.get(name) or (named(name, f"{KEY}.tools") if isinstance(name, str) and "." in name else None)
        if make is None:
            raise UserError(f"there is no tool {name!r}", key=f"{KEY}.tools", fix=f"{', '.join(TOOLS)}, or package.module.Class")
        try:
            tool = make(**settings.get(name, {}))
        except UserError:
            raise
        except Exception as error:  # a class of the user's may raise anything
            raise UserError(f"tool {name} cannot be made: {told(error)}", key=f"{KEY}.settings.{name}", fix="mend it") from None
        if problem := _unfit(tool):
            raise UserError(f"tool {name} {problem}", key=f"{KEY}.tools", fix="runner/tools/protocol.py says what a tool is")
        built.append(tool)
    return built


def _unfit(tool: Any) -> str:
    """What a tool lacks; "" for one that can be told of and called."""
    if missing := [part for part in ("name", "description", "parameters", "call") if not hasattr(tool, part)]:
        return f"has no {', '.join(missing)}"
    if not isinstance(tool.name, str) or not tool.name or not isinstance(tool.description, str):
        return f"has the name {tool.name!r} and the description {tool.description!r}; both are texts"
    if not callable(tool.call):
        return "has a call that is no function"
    parameters = tool.parameters
    if not isinstance(parameters, dict) or not all(isinstance(k, str) and isinstance(v, dict) for k, v in parameters.items()):
        return f"has parameters that are no JSON schema properties by name: {str(parameters)[:200]}"
    try:
        json.dumps(parameters)
        unknown = sorted(set(getattr(tool, "required", ())) - set(parameters))
    except (TypeError, ValueError) as error:
        return f"has a schema that is no JSON: {told(error)}"
    return f"requires {', '.join(map(str, unknown))}, which its parameters do not name" if unknown else ""


def _close(tool: Tool) -> None:
    if close := getattr(tool, "close", None):
        close()


def _parts(result: Any) -> list[Any]:
    """What a tool returned as texts and images; everything else becomes a text."""
    return [part if is_image(part) or isinstance(part, str) else str(part) for part in parts_of(result)]


def _joined(results: list[list[Any]]) -> Any:
    """One observation of several results, a line each."""
    parts: list[Any] = []
    for number, result in enumerate(results):
        parts += [*(["\n"] if number else []), *result]
    return parts if any(map(is_image, parts)) else "".join(parts)


__all__ = ["CLOSE", "OPEN", "TOOLS", "ToolEnvironment"]
