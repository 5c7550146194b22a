"""Tool calls in a model's text, as chat templates teach them.

hermes  <tool_call>{"name": .., "arguments": {..}}</tool_call>, any number of them: Hermes, Qwen2.5 and Qwen3. `arguments` may
        be a text that holds JSON, which is OpenAI's convention
qwen    <tool_call><function=name><parameter=key>value</parameter></function></tool_call>: Qwen3-Coder
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from runner.tools.protocol import Call

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FORMATS = ("hermes", "qwen")
MAX_CALLS = 16  # of one turn; more are not looked at
MAX_CALL_CHARACTERS = 100_000
_FUNCTION = re.compile(r"\s*<function=([^>\s]{1,200})>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]{1,200})>\n?(.*?)\n?</parameter>", re.DOTALL)


def calls(text: str, form: str) -> list[Call]:
    """The calls of one turn in their order; one that cannot be read has an `error`."""
    found = []
    for body in _bodies(text):
        if body is None:
            found.append(Call(error=f"a call does not end in {CLOSE}"))
        elif len(body) > MAX_CALL_CHARACTERS:
            found.append(Call(error=f"a call of {len(body)} characters"))
        else:
            found.append(_hermes(body) if form == "hermes" else _qwen(body))
    return found


def _bodies(text: str) -> Iterator[str | None]:
    rest = text
    for _ in range(MAX_CALLS):
        _, there, rest = rest.partition(OPEN)
        if not there:
            return
        body, closed, rest = rest.partition(CLOSE)
        yield body if closed else None


def _hermes(body: str) -> Call:
    try:
        value = json.loads(body)
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError, AttributeError) as error:
        return Call(error=f"a call that is no JSON object: {error}")
    if not isinstance(value.get("name"), str) or not isinstance(arguments, dict):
        return Call(error='a call is {"name": text, "arguments": object}')
    return Call(value["name"], arguments)


def _qwen(body: str) -> Call:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        return Call(error="a call is <function=name> .. </function>")
    return Call(function[1], {match[1]: match[2] for match in _PARAMETER.finditer(function[2])})
