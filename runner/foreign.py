"""Code of the user's that may raise anything, hang, or hold the event loop that others share.

A function runs in a daemon thread of its own (`in_thread`), coroutines share an event loop (`UserLoop`). What does not end is
interrupted where it runs Python code; what blocks inside C code keeps its thread until it returns, and its result is dropped.
No thread here keeps the program from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

from runner.errors import told

BLOCKED_SECONDS = 30.0  # a coroutine that holds its event loop for so long is interrupted; all others wait meanwhile
HEARTBEAT_SECONDS = 0.2
CLOSE_SECONDS = 5.0  # for coroutines to end when they are cancelled
SILENT_SECONDS = (
    1.0  # that a loop is silent further before it is touched: after the whole process stood still it gets time to beat
)

OWNER: contextvars.ContextVar[int | None] = contextvars.ContextVar("owner", default=None)  # whose coroutine runs


class Interrupted(BaseException):
    """Raised inside user code past its deadline; not an Exception, so that `except Exception` lets it through."""


def interrupt(thread: threading.Thread) -> None:
    """Raise Interrupted in the Python code of a thread."""
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted))


def harmless(error: BaseException) -> Exception:
    """The error as one that a future can hold: SystemExit would end the event loop, StopIteration is no error to asyncio."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(told(error)).with_traceback(error.__traceback__)


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that runs in a daemon thread of its own. Cancelling interrupts its Python code; what blocks
    inside C code keeps its thread until it returns, and its result is dropped."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except Interrupted:
            return
        except BaseException as raised:  # SystemExit of a library's exit() ends this call only
            error = harmless(raised)
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    thread = threading.Thread(target=work, name="environment", daemon=True)
    thread.start()
    try:
        return await answer
    except asyncio.CancelledError:
        interrupt(thread)
        raise


class _DaemonThreads(ThreadPoolExecutor):
    """For `asyncio.to_thread`: a daemon thread for every call. A pool's own threads are waited for when the program ends."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*arguments, **named)
            except BaseException as error:
                future.set_exception(harmless(error))
            else:
                future.set_result(result)

        threading.Thread(target=work, name="environment", daemon=True).start()
        return future


class UserLoop:
    """An event loop in a daemon thread. Errors that end a loop end the coroutine they were raised in, and the loop goes on.

    A task belongs to the OWNER of the context that made it, and so do the tasks that it makes.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(_DaemonThreads())
        self.loop.set_task_factory(self._owned)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._owners: WeakKeyDictionary[asyncio.Task[Any], int | None] = WeakKeyDictionary()
        self._beat = time.monotonic()
        self._silent_since: float | None = None
        self._interrupted = False
        self._closing = False
        self.thread.start()
        self.call(self._heart)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function in the loop's thread, soon."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], owner: int) -> asyncio.Task[Any]:
        """A task of this owner; from within the loop's thread."""
        context = contextvars.copy_context()
        context.run(OWNER.set, owner)
        return context.run(self.loop.create_task, coroutine)

    def look(self) -> str | None:
        """To be called now and then from another thread. Where a coroutine holds the loop: "interrupted" when that was just done;
        "lost" when it did not help, because the coroutine blocks inside C code. Else None.
        """
        now = time.monotonic()
        if now - self._beat < BLOCKED_SECONDS:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        elif now - self._silent_since > SILENT_SECONDS:
            self._silent_since, self._beat = None, now
            if self._interrupted:
                return "lost"
            self._interrupted = True
            interrupt(self.thread)
            return "interrupted"
        return None

    def holder(self) -> tuple[int | None, str]:
        """(owner of the task that runs, the file and line that its thread is at), seen from another thread."""
        task = asyncio.current_task(self.loop)
        frame = sys._current_frames().get(self.thread.ident or 0)
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "?"
        return (self._owners.get(task) if task else None), place

    def abandon(self) -> None:
        """Leave a loop behind: what runs there is cancelled, if need be when its thread returns, and nobody hears of it."""
        self._closing = True
        self.loop.set_exception_handler(lambda *_: None)
        self.call(self._cancel)
        self.call(self._stop_when_done)

    def close(self) -> None:
        """Cancel what is left, and end the loop; a coroutine that neither ends nor can be interrupted keeps its daemon thread."""
        self.abandon()
        self.thread.join(timeout=CLOSE_SECONDS)
        if self.thread.is_alive():
            self.call(self.loop.stop)
            self.thread.join(timeout=0.5)
        if not self.thread.is_alive():
            self.loop.close()

    def _owned(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        self._owners[task] = OWNER.get()
        return task

    def _run(self) -> None:
        while not self.loop.is_closed():
            try:
                self.loop.run_forever()
                return
            except BaseException:  # SystemExit and KeyboardInterrupt of a task, which has them as its own error by then
                continue

    def _heart(self) -> None:
        self._beat, self._interrupted = time.monotonic(), False
        if not self._closing:
            self.loop.call_later(HEARTBEAT_SECONDS, self._heart)

    def _cancel(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()

    def _stop_when_done(self) -> None:
        if not asyncio.all_tasks(self.loop):
            self.loop.stop()
        else:
            self.loop.call_later(0.01, self._stop_when_done)
