"""An environment that carries out tool calls; a turn without a call is the answer, which the task rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from runner.errors import UserError, told
from runner.tasks.protocol import Prompt
from runner.tools.calculator import Calculator
from runner.tools.calls import CLOSE, FORMATS, OPEN, calls
from runner.tools.protocol import Call, Tool, ToolError
from runner.tools.sandbox import PythonSandbox
from runner.turns.context import in_thread

TOOLS: dict[str, Callable[..., Tool]] = {"calculator": Calculator, "python": PythonSandbox}


class ToolEnvironment:
    """task.rollout.environment=runner.turns.tools.ToolEnvironment; its arguments:

    tools          names of TOOLS, or package.module.Class of the user's own
    settings       arguments of a tool by its name
    format         how calls are written (runner/tools/calls.py)
    error_penalty  taken from the reward for a call that cannot be carried out, as reward/tool_errors. The task's own reward is
                   reward/task beside it
    """

    def __init__(
        self,
        tools: list[str],
        settings: dict[str, dict[str, Any]] | None = None,
        format: str = "hermes",
        error_penalty: float = 0.0,
    ) -> None:
        if format not in FORMATS:
            raise UserError(f"{format!r} is no format of calls", key="task.rollout.arguments.format", fix=" or ".join(FORMATS))
        from runner.turns.conversations import named

        built = []
        for name in tools:
            make = TOOLS.get(name) or (named(name, "task.rollout.arguments.tools") if "." in name else None)
            if make is None:
                raise UserError(
                    f"there is no tool {name!r}",
                    key="task.rollout.arguments.tools",
                    fix=f"{', '.join(TOOLS)}, or package.module.Class",
                )
            built.append(make(**(settings or {}).get(name, {})))
        self.tools: dict[str, Tool] = {tool.name: tool for tool in built}
        self.format, self.penalty = format, error_penalty

    async def reset(self, prompt: Prompt) -> None:
        return None

    async def step(self, response: str) -> tuple[str, bool, dict[str, Any]]:
        found = calls(response, self.format)
        if not found:
            return "", True, {}
        results = await asyncio.gather(*(self._result(call) for call in found))
        wrong = sum(error for _, error in results)
        info: dict[str, Any] = {"calls": [call.name for call in found], "tool_calls": len(found), "tool_errors": wrong}
        if self.penalty and wrong:
            info["penalties"] = {"tool_errors": -self.penalty * wrong}
        return "\n".join(text for text, _ in results), False, info

    async def _result(self, call: Call) -> tuple[str, bool]:
        """(what the model sees, whether the call went wrong)."""
        if call.error is not None:
            return f"error: {call.error}", True
        tool = self.tools.get(call.name)
        if tool is None:
            return f"error: there is no tool {call.name[:100]!r}; there are {', '.join(self.tools)}", True
        arguments = call.arguments or {}
        if set(arguments) != set(tool.parameters):
            return f"error: {tool.name} takes {', '.join(tool.parameters)}", True
        try:
            return str(await in_thread(lambda: tool.call(**arguments))), False
        except ToolError as error:
            return f"error: {error}", True
        except Exception as error:
            return f"error: {told(error)}", True


__all__ = ["CLOSE", "OPEN", "TOOLS", "ToolEnvironment"]
