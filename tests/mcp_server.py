"""An MCP server of the tests, spoken to over standard input and output."""

from __future__ import annotations

import io
import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from PIL import Image as Pictures

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int = 10) -> int:
    """The sum of two numbers."""
    return a + b


@server.tool()
def picture(side: int) -> list[str | Image]:
    """A red square."""
    file = io.BytesIO()
    Pictures.new("RGB", (side, side), (255, 0, 0)).save(file, "PNG")
    return ["a square:", Image(data=file.getvalue(), format="png")]


@server.tool()
def damaged() -> Image:
    """No image at all."""
    return Image(data=b"no image", format="png")


@server.tool()
def fails() -> str:
    """Raises."""
    raise ValueError("not today")


@server.tool()
def sleeps(seconds: float) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def floods() -> str:
    """Says much."""
    return "x" * 100_000


@server.tool()
def secret() -> str:
    """What the process sees of the run's variables."""
    return os.environ.get("TEST_SECRET", "nothing") + os.environ.get("GIVEN", "")


@server.tool()
def dies() -> str:
    """Ends the process."""
    print("killed by its own hand", file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    server.run("stdio")
