"""A reward service: a judge or a reward model behind HTTP.

It gets POST {"items": [{"prompt": .., "response": .., "answer": .., "prompt_id": ..}, ..]} and answers {"rewards": [number, ..]},
one for each item in their order.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from runner.config.schema import RewardConfig
from runner.data import Sample
from runner.errors import UserError, told
from runner.tasks.protocol import Prompt
from runner.tasks.rewards import no_reward

BACKOFF_SECONDS = 0.5
MAX_ANSWER_BYTES = 16 << 20


def ask(part: RewardConfig, items: Sequence[tuple[Prompt, str, Sample]]) -> tuple[list[float | None], str | None]:
    """The service's rewards for one batch; None for all of them, and the reason, where it never gave a usable answer."""
    assert part.url is not None
    rows = [{"prompt": p.text, "response": text, "answer": p.answer, "prompt_id": p.prompt_id} for p, text, _ in items]
    body = json.dumps({"items": rows}).encode()
    headers = {"Content-Type": "application/json"}
    if part.key_variable:
        headers["Authorization"] = f"Bearer {os.environ.get(part.key_variable, '')}"
    reason = ""
    for attempt in range(part.max_retries + 1):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(part.url, body, headers, method="POST")
            with _OPENER.open(request, timeout=part.timeout_seconds) as reply:
                return _read(_body(reply, part.timeout_seconds), len(items)), None
        except urllib.error.HTTPError as error:
            reason = f"the service answered {error.code}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:  # the last: an answer that is no HTTP
            reason = told(error)
    return [None] * len(items), reason


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would go on without its body, and take the key to another host."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _body(reply: Any, seconds: float) -> bytes:
    """The answer's body. TimeoutError for one that comes in drops: the socket's timeout counts each of them anew."""
    deadline, found = time.monotonic() + seconds, b""
    while part := reply.read1(1 << 16):
        found += part
        if time.monotonic() > deadline:
            raise TimeoutError(f"no whole answer within {seconds:g} s")
        if len(found) > MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
    return found


def _read(text: bytes, count: int) -> list[float | None]:
    """ValueError for anything but `count` finite numbers."""
    answer = json.loads(text)
    values = answer.get("rewards") if isinstance(answer, dict) else None
    if isinstance(values, list) and len(values) == count and not any(map(no_reward, values)):
        return [float(value) for value in values]
    raise ValueError(f'the service\'s answer is not {{"rewards": [..]}} with {count} finite numbers: {bytes(text[:60])!r}')


def check(key: str, part: RewardConfig) -> Iterator[UserError]:
    url = urlsplit(part.url or "")
    if url.scheme not in ("http", "https") or not url.hostname:
        yield UserError(f"{part.url!r} is no address of a service", key=f"{key}.url", fix="http://127.0.0.1:8000/score")
    elif url.username or url.password:
        problem = "an address with a password would be written into the run's files"
        yield UserError(problem, key=f"{key}.url", fix=f"{key}.key_variable=<the environment variable with the key>")
    if part.key_variable and part.key_variable not in os.environ:
        yield UserError(f"{part.key_variable} is not set", key=f"{key}.key_variable", fix=f"export {part.key_variable}=..")
