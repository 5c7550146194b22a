"""What a tool is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class ToolError(Exception):
    """A call that a tool refuses or fails at; its text is what the model sees."""


class Tool(Protocol):
    """`name` and `parameters` (JSON schema properties by name, all required) are what a model is told of it."""

    name: str
    description: str
    parameters: dict[str, dict[str, Any]]

    def call(self, **arguments: Any) -> str:
        """The result as the model sees it. ToolError for a call that makes no sense."""
        ...


@dataclass(frozen=True)
class Call:
    """One call of a model; `error` instead of the rest where it cannot be read."""

    name: str = ""
    arguments: dict[str, Any] | None = None
    error: str | None = None


def schema(tool: Tool) -> dict[str, Any]:
    """OpenAI's description of a function."""
    parameters = {"type": "object", "properties": tool.parameters, "required": list(tool.parameters)}
    return {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": parameters}}
