"""`runner watch`: the report of a run while it goes on, on this machine's loopback. Reads the run's folder, writes nothing.

Whoever has the address may read: it holds a token. Other pages of the same browser cannot: a request must name this machine
itself as its host (a foreign name that resolves to it does not count), and must not come from another origin.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from runner.errors import UserError
from runner.tracking import page
from runner.tracking.folder import read_jsonl, rollout_files, run_state
from runner.tracking.report import body_of, read_run, with_images

if TYPE_CHECKING:
    from aiohttp import web

HOST = "127.0.0.1"
OURS = ("127.0.0.1", "localhost", "::1")  # names that a request may ask for; the port may be a tunnel's
LOOK_SECONDS = 1.0  # between two looks at the folder
DRAW_SHARE = 0.1  # of the time that drawing may take: the cores are the run's
ALIVE_SECONDS = 15.0  # between two signs of life on a quiet stream of events
FILES = ("metrics.jsonl", "timeline.jsonl", "events.jsonl", "status.json", "resolved.yaml", "rollouts")
Handler = Callable[["web.Request"], Awaitable["web.StreamResponse"]]


class LivePage:
    """The body of the page, drawn anew when the folder changes. `version` counts the drawings."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the folder is no run, or is damaged."""
        self.folder = folder
        self.version = 1
        self._seen = self._looks()
        self.body = self._drawn()

    def refresh(self) -> bool:
        """Draw what changed since the last call; whether anything did. A folder that is damaged meanwhile says so on the page."""
        if (looks := self._looks()) == self._seen:
            return False
        self._seen = looks
        try:
            self.body = self._drawn()
        except UserError as error:
            self.body = page.header(self.folder.name, "unknown", [], []) + page.preformatted(str(error))
        self.version += 1
        return True

    def _looks(self) -> tuple[object, ...]:
        """Differs when something was written, and when the run's process has gone."""
        found: list[object] = [run_state(self.folder)]
        for name in FILES:
            try:
                state = (self.folder / name).stat()
                found.append((state.st_mtime_ns, state.st_size, state.st_ino))
            except OSError:
                found.append(None)
        return tuple(found)

    def _drawn(self) -> str:
        steps = [step for step, _ in rollout_files(self.folder)]
        links = page.links("Samples by step, token by token", [(f"step/{step + 1}", str(step + 1)) for step in steps[::-1]])
        drawn = f'<div id="live" role="status">as of {time.strftime("%H:%M:%S UTC", time.gmtime())}</div>'
        return body_of(read_run(self.folder), live=drawn + links)

    def step(self, number: int) -> str | None:
        """The page with every kept sample of a step, counted from 1; None where there is none."""
        file = dict(rollout_files(self.folder)).get(number - 1)
        if file is None:
            return None
        rows = [(number - 1, with_images(file.parent, number - 1, row)) for row in read_jsonl(file)]
        back = '<p><a class="back" href="../">back to the run</a></p>'
        body = page.header(self.folder.name, f"step {number}", [], []) + back + page.samples(rows, every_token=True)
        return page.document(f"{self.folder.name}, step {number}", body)


class Server:
    """Answers for one `LivePage`, below a path that is the token."""

    def __init__(self, live: LivePage, token: str) -> None:
        self.live, self.token = live, token
        self.ending = False
        self._changed = asyncio.Condition()

    def application(self) -> web.Application:
        from aiohttp import web

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._guard(request)
            return await handler(request)

        application = web.Application(middlewares=[guarded])
        application.router.add_get("/{token}/", self._page)
        application.router.add_get("/{token}/body", self._body)
        application.router.add_get("/{token}/events", self._events)
        application.router.add_get(r"/{token}/step/{number:\d{1,12}}", self._step)
        return application

    async def follow(self) -> None:
        """Look at the folder until the end, and tell every reader of what is new."""
        while True:
            began = time.monotonic()
            changed = await asyncio.to_thread(self.live.refresh)
            if changed:
                await self._tell()
            took = time.monotonic() - began
            await asyncio.sleep(max(LOOK_SECONDS, took / DRAW_SHARE - took if changed else 0.0))

    async def end(self) -> None:
        """Streams of events close."""
        self.ending = True
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _guard(self, request: web.Request) -> None:
        """403 for who has not the token, comes under another name or from another page."""
        from aiohttp import web

        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if not _is_ours(host) or (origin is not None and origin != f"http://{host}"):
            raise web.HTTPForbidden(text="asked from elsewhere\n", headers=HEADERS)
        if not secrets.compare_digest(request.path.split("/")[1].encode(), self.token.encode()):
            raise web.HTTPForbidden(text="open the whole address that `runner watch` printed\n", headers=HEADERS)

    async def _page(self, request: web.Request) -> web.Response:
        return _html(page.document(self.live.folder.name, self.live.body, live=True), live=True)

    async def _body(self, request: web.Request) -> web.Response:
        return _html(self.live.body, live=True)

    async def _step(self, request: web.Request) -> web.Response:
        from aiohttp import web

        try:
            text = await asyncio.to_thread(self.live.step, int(request.match_info["number"]))
        except UserError as error:
            raise web.HTTPConflict(text=f"{error}\n", headers=HEADERS) from None
        if text is None:
            raise web.HTTPNotFound(text="no samples are kept of that step\n", headers=HEADERS)
        return _html(text)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """A stream of server-sent events: `drawn`, whose id is the drawing's number; one that missed some gets the last."""
        from aiohttp import web

        response = web.StreamResponse(headers=HEADERS | {"Content-Type": "text/event-stream"})
        await response.prepare(request)
        last = request.headers.get("Last-Event-ID", "")
        told = int(last) if last.isascii() and last.isdigit() and len(last) < 12 else 0
        try:
            while not self.ending:
                if self.live.version != told:
                    told = self.live.version
                    await response.write(f"id: {told}\nevent: drawn\ndata: {told}\n\n".encode())
                    continue
                await self._wait(told)
                if self.live.version == told:
                    await response.write(b": alive\n\n")
        except ConnectionResetError:  # the reader has gone
            pass
        return response

    async def _wait(self, told: int) -> None:
        try:
            async with asyncio.timeout(ALIVE_SECONDS), self._changed:
                await self._changed.wait_for(lambda: self.ending or self.live.version != told)
        except TimeoutError:
            return


HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address is the key
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def _html(text: str, *, live: bool = False) -> web.Response:
    from aiohttp import web

    headers = HEADERS | {"Content-Security-Policy": f"{page.policy(live=live)}; frame-ancestors 'none'"}
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)


def _is_ours(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in OURS
    except ValueError:
        return False


def serve(folder: Path, port: int, say: Callable[[str], None] = print) -> None:
    """Serve the page of this run until Ctrl-C or SIGTERM; `say` gets the line with the address. `port` 0 takes a free one.

    Raises UserError where the folder is no run or is damaged, the port is taken, or aiohttp is not installed.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise UserError("watch needs the `aiohttp` package, which is not installed", fix="pip install 'runner[watch]'") from None
    asyncio.run(_serve(LivePage(folder), port, say))


async def _serve(live: LivePage, port: int, say: Callable[[str], None]) -> None:
    from aiohttp import web

    server, done = Server(live, secrets.token_urlsafe(24)), asyncio.Event()
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    following: asyncio.Task[None] | None = None
    try:
        site = web.TCPSite(runner, HOST, port)
        try:
            await site.start()
        except OSError as error:
            raise _no_port(port, error) from error
        loop = asyncio.get_running_loop()
        for kind in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(kind, done.set)
        following = asyncio.create_task(server.follow())
        following.add_done_callback(lambda _: done.set())  # it ends by an error alone
        address = f"http://{HOST}:{runner.addresses[0][1]}/{server.token}/"
        say(f"{live.folder} ({run_state(live.folder)}): {address}\nCtrl-C ends it")
        await done.wait()
        if following.done():
            following.result()
    finally:
        if following is not None:
            following.cancel()
        await server.end()
        await runner.cleanup()


def _no_port(port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} is in use", key="--port", fix="--port 0 takes a free one")
    if error.errno == errno.EACCES:
        return UserError(f"port {port} may not be opened by this user", key="--port", fix="--port 0 takes a free one")
    return UserError(f"port {port} cannot be opened: {os.strerror(error.errno or 0)}", key="--port", fix="--port 0")
