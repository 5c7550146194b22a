"""Tools of servers that speak the Model Context Protocol (MCP), through the `mcp` package (pip install 'runner[mcp]').

A server is a process that the run starts and talks to over its standard input and output, or an address. One connection serves
all conversations of the process, their calls beside each other: what a server remembers, it remembers for all of them.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import binascii
import contextlib
import importlib.util
import json
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from runner.errors import UserError
from runner.models.pictures import MAX_FILE_BYTES, open_rgb
from runner.tools.protocol import ToolError, ToolLost

KEY = "task.rollout.arguments.mcp"
START_SECONDS = 60.0
END_SECONDS = 15.0
MAX_TOOLS = 200


@dataclass(frozen=True)
class ServerConfig:
    """One entry of task.rollout.arguments.mcp.

    command   the program and its arguments; or
    url       of a server that runs already (streamable HTTP)
    tools     names of those that the model may call; empty: all
    env       variables of the process beside PATH, HOME and the like; it gets none of the run's own
    """

    command: tuple[str, ...] = ()
    url: str | None = None
    tools: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    timeout_seconds: float = 30.0
    output_characters: int = 4000  # of a call's result; the rest is cut

    @classmethod
    def of(cls, name: str, values: Any) -> ServerConfig:
        """UserError naming the key that is wrong."""
        key = f"{KEY}.{name}"
        if not isinstance(values, dict) or (unknown := values.keys() - cls.__dataclass_fields__.keys()):
            what = f"no such key: {', '.join(sorted(map(str, unknown)))}" if isinstance(values, dict) else "no mapping"
            raise UserError(what, key=key, fix=f"{', '.join(cls.__dataclass_fields__)}")
        command, url = values.get("command") or (), values.get("url")
        if isinstance(command, str) or bool(command) == bool(url):
            raise UserError("a server is a command or an address", key=key, fix=f"+{key}.command=[python,server.py]")
        numbers = {name: values[name] for name in ("timeout_seconds", "output_characters") if name in values}
        if any(not isinstance(number, int | float) or number <= 0 for number in numbers.values()):
            raise UserError(f"{numbers}: not above 0", key=key, fix=f"+{key}.timeout_seconds=30")
        env = {str(variable): str(value) for variable, value in (values.get("env") or {}).items()}
        return cls(tuple(map(str, command)), url, tuple(map(str, values.get("tools") or ())), env, **numbers)


class McpTool:
    """A tool of a server. `required`: the arguments that a call must have."""

    def __init__(self, server: Server, config: ServerConfig, listed: Any) -> None:
        schema = listed.input_schema or {}
        self.server, self.config = server, config
        self.name, self.description = listed.name, listed.description or ""
        self.parameters: dict[str, dict[str, Any]] = dict(schema.get("properties") or {})
        self.required = frozenset(schema.get("required") or ())

    def call(self, **arguments: Any) -> Any:
        """The result's texts and images. ToolError for what the server calls an error, or does not answer in time; ToolLost where
        the server is gone."""
        typed = {name: _typed(value, self.parameters.get(name, {})) for name, value in arguments.items()}
        result = self.server.call(self.name, typed, self.config.timeout_seconds)
        parts = [_part(block) for block in result.content]
        text = "\n".join(part for part in parts if isinstance(part, str))
        if result.is_error:
            raise ToolError(text[: self.config.output_characters] or "the tool failed")
        if len(text) > self.config.output_characters:
            return [text[: self.config.output_characters] + "\n[cut]", *(part for part in parts if not isinstance(part, str))]
        return parts or ""


def tools(configured: dict[str, Any]) -> list[McpTool]:
    """The tools of all servers, which are started where they do not run yet. UserError where one cannot be had."""
    return [tool for name, values in configured.items() for tool in _tools_of(name, ServerConfig.of(name, values))]


def check(configured: Any) -> Iterator[UserError]:
    """What is wrong with task.rollout.arguments.mcp, the servers themselves included: they are started."""
    if not isinstance(configured, dict):
        yield UserError("no mapping of names to servers", key=KEY, fix=f"+{KEY}.mine.command=[python,server.py]")
        return
    if importlib.util.find_spec("mcp") is None:
        yield UserError("MCP servers need the `mcp` package, which is not installed", key=KEY, fix="pip install 'runner[mcp]'")
        return
    for name, values in configured.items():
        try:
            _tools_of(name, ServerConfig.of(name, values))
        except UserError as error:
            yield error


def _tools_of(name: str, config: ServerConfig) -> list[McpTool]:
    server = _running(name, config)
    there = {listed.name: listed for listed in server.listed}
    if missing := [wanted for wanted in config.tools if wanted not in there]:
        problem = f"MCP server {name} has no tool {', '.join(missing)}; it has {', '.join(there)}"
        raise UserError(problem, key=f"{KEY}.{name}.tools", fix="one that it has")
    return [McpTool(server, config, there[wanted]) for wanted in config.tools or there]


# ---- connections

_servers: dict[str, Server] = {}
_lock = threading.Lock()


def _running(name: str, config: ServerConfig) -> Server:
    """The one connection to this server; a new one where it was lost."""
    key = json.dumps([name, config.command, config.url, config.env], sort_keys=True)
    with _lock:
        server = _servers.get(key)
        if server is None or server.lost:
            server = _servers[key] = Server(name, config)
        return server


def close_all() -> None:
    """End every connection, and the processes that were started."""
    with _lock:
        for server in _servers.values():
            server.close()
        _servers.clear()


atexit.register(close_all)


class Server:
    """A connection, in a thread with an event loop of its own. `listed`: the tools that it has."""

    def __init__(self, name: str, config: ServerConfig) -> None:
        """UserError where it does not start, or does not list its tools within START_SECONDS."""
        self.name, self.config, self.lost = name, config, False
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  what the process says on standard error
        self._ready: Future[list[Any]] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._client: Any = None
        self._thread = threading.Thread(target=self._run, name=f"mcp {name}", daemon=True)
        self._thread.start()
        try:
            self.listed = self._ready.result(START_SECONDS)
        except Exception as error:
            self.close()
            said = self._last_words() or " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"MCP server {name} did not start: {said}", key=f"{KEY}.{name}", fix="start it by hand") from None

    def call(self, tool: str, arguments: dict[str, Any], seconds: float) -> Any:
        """The server's CallToolResult. ToolError and ToolLost as `McpTool.call`."""
        if self.lost:
            raise ToolLost(f"MCP server {self.name} is gone")
        from mcp import MCPError

        answer = asyncio.run_coroutine_threadsafe(asyncio.wait_for(self._client.call_tool(tool, arguments), seconds), self._loop)
        try:
            return answer.result(seconds + END_SECONDS)
        except TimeoutError:
            answer.cancel()
            raise ToolError(f"no answer within {seconds:g} s") from None
        except MCPError as error:
            if self.lost or not self._thread.is_alive():
                raise ToolLost(f"MCP server {self.name} is gone: {self._last_words()}") from None
            if "closed" in str(error).lower():
                self.lost = True
                raise ToolLost(f"MCP server {self.name} is gone: {self._last_words() or error}") from None
            raise ToolError(str(error)) from None
        except Exception as error:
            self.lost = True
            raise ToolLost(f"MCP server {self.name} is gone: {self._last_words() or type(error).__name__}") from None

    def close(self) -> None:
        self.lost = True
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._connected())
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error if isinstance(error, Exception) else RuntimeError(type(error).__name__))
        finally:
            self.lost = True
            self._loop.close()

    async def _connected(self) -> None:
        from mcp import Client, StdioServerParameters, stdio_client

        config = self.config
        if config.url is not None:
            target: Any = config.url
        else:
            command, *arguments = config.command
            parameters = StdioServerParameters(command=command, args=arguments, env=config.env or None)
            target = stdio_client(parameters, errlog=self._errors)
        async with Client(target) as self._client:
            listed, cursor = [], None
            while True:
                page = await self._client.list_tools(cursor=cursor)
                listed += page.tools
                cursor = page.next_cursor
                if not cursor or len(listed) >= MAX_TOOLS:
                    break
            self._ready.set_result(listed)
            await self._stop.wait()

    def _last_words(self) -> str:
        """The last line that the process wrote on standard error."""
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            lines = self._errors.read()[-20_000:].split("\n")
            return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
        return ""


# ---- arguments and results


def _typed(value: Any, schema: dict[str, Any]) -> Any:
    """An argument as its schema wants it, where the format of calls has nothing but texts (Qwen3-Coder's)."""
    if isinstance(value, str) and schema.get("type") in ("integer", "number", "boolean", "array", "object"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _part(block: Any) -> Any:
    """A text, or a PIL image; what is neither as a text that says what it is."""
    if block.type == "text":
        return block.text
    if block.type == "image":
        try:
            if len(block.data) > MAX_FILE_BYTES * 4 // 3:
                raise ValueError("it is too large")
            return open_rgb(base64.b64decode(block.data, validate=True))
        except (binascii.Error, ValueError) as error:
            raise ToolError(f"an image that cannot be shown: {error}") from None
    return f"[{block.type}]"
