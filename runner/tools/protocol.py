"""What a tool is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class ToolError(Exception):
    """A call that a tool refuses or fails at; its text is what the model sees."""


class ToolLost(Exception):
    """What a tool runs on is gone: no fault of the call, so the conversation fails instead of seeing an error."""


class Tool(Protocol):
    """`name` and `parameters` (JSON schema properties by name, all required unless there is an attribute `required`) are what
    a model is told of it. It may have `begin(prompt)`, called when a conversation begins, and `close()`, when it is over."""

    name: str
    description: str
    parameters: dict[str, dict[str, Any]]

    def call(self, **arguments: Any) -> Any:
        """The result as the model sees it: a text, an image (of PIL, or uint8 [height, width, 3]), or a list of both. ToolError
        for a call that makes no sense."""
        ...


@dataclass(frozen=True)
class Call:
    """One call of a model; `error` instead of the rest where it cannot be read."""

    name: str = ""
    arguments: dict[str, Any] | None = None
    error: str | None = None


def required(tool: Tool) -> frozenset[str]:
    """The arguments that a call must have."""
    return frozenset(getattr(tool, "required", tool.parameters))


def schema(tool: Tool) -> dict[str, Any]:
    """OpenAI's description of a function."""
    parameters = {
        "type": "object",
        "properties": tool.parameters,
        "required": [name for name in tool.parameters if name in required(tool)],
    }
    return {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": parameters}}
