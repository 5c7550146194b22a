"""Environments, rollout functions and rewards as people write them by mistake: each costs its sample and says why."""

from __future__ import annotations

import asyncio
import http.server
import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_reward_parts import items
from test_turns import conversation, run
from test_vision import processor

from runner import foreign
from runner.config import compose
from runner.config.schema import RewardConfig
from runner.data import Sample, Status
from runner.errors import UserError
from runner.models.images import PlacedImage
from runner.rollout import feed
from runner.tasks import parts, service
from runner.tasks.protocol import Prompt
from runner.turns import conversations
from runner.turns.context import Context, Engine
from runner.turns.failure import Failed
from runner.turns.pictures import Pictures
from runner.turns.tools import ToolEnvironment
from tests.configs import composed, problems

HERE = __name__


class Odd:
    """An environment that does what its prompt's text names, on its second turn."""

    def __init__(self) -> None:
        self.turns = 0
        self.close = 3.5  # a closing price, say

    async def reset(self, prompt: Prompt) -> None:
        self.what = prompt.text
        prompt.info.clear()

    def step(self, response: str) -> Any:
        self.turns += 1
        if self.turns == 1:
            return "go on", False, {}
        return ANSWERS[self.what]()


class OddAsync(Odd):
    async def step(self, response: str) -> Any:
        return super().step(response)


def _exit() -> None:
    raise SystemExit(3)


def _cancel() -> None:
    raise asyncio.CancelledError


async def _later() -> Any:
    return "", True, {"reward": 1.0}


ANSWERS: dict[str, Callable[[], Any]] = {
    "fine": lambda: ("", True, {"reward": 1.0}),
    "numpy": lambda: ("", np.bool_(True), {"reward": np.float32(1.0), "tool_calls": 10**400, "self": 1}),
    "half a character": lambda: ("\ud800", True, {"reward": 1.0, "said": ["\udfff"]}),
    "coroutine": _later,
    "exits": _exit,
    "says half a character": lambda: float("\ud800"),
    "out of turns": lambda: next(iter([])),
    "cancels": _cancel,
    "five": lambda: ("", 1.0, True, False, {}),
    "rewards": lambda: ("", True, {"rewards": np.zeros(2)}),
    "huge": lambda: ("", True, {"reward": 1e300}),
    "text": lambda: ("", True, {"reward": "1.0"}),
}
REASONS = {
    "exits": ("environment", "SystemExit: 3 (tests/test_turns_odd.py:"),
    "out of turns": ("environment", "StopIteration"),
    "says half a character": ("environment", "could not convert string to float: '"),
    "cancels": ("", ""),
    "five": ("rubbish", "returned 5 values, not (observation, done, info)"),
    "rewards": ("rubbish", "info['rewards'] of the environment is a ndarray"),
    "huge": ("rubbish", "is 1e+300, beyond 1e+09"),
    "text": ("rubbish", "is a str"),
}


@pytest.mark.parametrize("kind", ["Odd", "OddAsync"])
def test_odd_environments(kind: str) -> None:
    texts = [name for name in ANSWERS for name in (name, "fine")]
    samples = run(conversation(environment=f"{HERE}.{kind}", timeout_seconds=20.0), texts, budget=1000)
    for text, sample in zip(texts, samples, strict=True):
        if text not in REASONS:
            assert (sample.status, sample.rewards) == (Status.completed, {"environment": 1.0}), text
        else:
            failed, reason = REASONS[text]
            assert sample.status is Status.failed and reason in sample.finish_reason and sample.finish_reason != "not done"
            assert not failed or sample.info["failed"] == failed or kind == "OddAsync", sample.finish_reason
        "\n".join([sample.finish_reason, str(sample.info)]).encode()
    assert "rollout/tool_calls" not in conversations.metrics(samples)


# ---- functions


async def plain(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    talk = context.start(prompt)
    await engine.generate(talk)
    talk.reward(1.0)
    return talk.sample()


async def odd(engine: Engine, prompt: Prompt, context: Context) -> Any:
    talk = context.start(prompt)
    match prompt.text:
        case "exits":
            raise SystemExit(1)
        case "a task exits":
            await asyncio.gather(asyncio.to_thread(_exit))
        case "two at once":
            await asyncio.gather(engine.generate(talk), engine.generate(talk))
        case "observes meanwhile":
            asking = asyncio.ensure_future(engine.generate(talk))
            await asyncio.sleep(0)
            talk.observe("not seen")
            await asking
        case "half a token":
            await engine.generate(talk, max_tokens=2.5)  # type: ignore[arg-type]
        case "no token":
            await engine.generate(talk, max_tokens=0)
        case "empty stop":
            await engine.generate(talk, stop=["a", ""])
        case "group":
            async with asyncio.TaskGroup() as group:
                group.create_task(_engine_fails())
        case "nan":
            talk.reward(float("nan"))
        case "leaves a task":
            asyncio.get_running_loop().create_task(asyncio.sleep(1000))
        case "one text":
            turn = await engine.generate(talk, stop="zza")  # no list of letters
            assert turn.text == "a" * len(turn.text) and turn.tokens[-1] == 1
            return talk.sample()
    sample = await plain(engine, prompt, context)
    match prompt.text:
        case "text":
            return "a sample"
        case "twice":
            return [sample, sample]
        case "tokens are a list":
            sample.tokens = sample.tokens.tolist()
        case "mask is none":
            sample.loss_mask = None  # type: ignore[assignment]
        case "mask of numbers":
            sample.loss_mask = sample.loss_mask.float()
        case "beyond the vocabulary":
            sample.tokens[-1] = 10**6
        case "infinite logprob":
            sample.rollout_logprobs[0] = -float("inf")
        case "reward of text":
            sample.rewards = {"a": "much"}  # type: ignore[dict-item]
        case "status":
            sample.status = Status.failed
        case "info":
            sample.info = None  # type: ignore[assignment]
        case "turns":
            sample.info["turns"] = [{"by": "me"}]
        case "board":
            sample.info["board"] = object()
    return sample


async def _engine_fails() -> None:
    raise Failed("engine", "it died")


FUNCTIONS: dict[str, tuple[str, str] | None] = {
    "fine": None,
    "leaves a task": None,
    "one text": None,
    "board": None,
    "exits": ("rollout", "SystemExit: 1"),
    "a task exits": ("rollout", "SystemExit: 3"),
    "two at once": ("rubbish", "while its next turn was generated"),
    "observes meanwhile": ("rubbish", "while its next turn was generated"),
    "half a token": ("rollout", "'float' object cannot be interpreted as an integer (tests/test_turns_odd.py:"),
    "no token": ("rollout", "max_tokens=0"),
    "empty stop": ("rollout", "none of them empty"),
    "group": ("engine", "it died"),
    "nan": ("rubbish", "reward environment is nan"),
    "text": ("rubbish", "returned str"),
    "twice": ("rubbish", "one sample twice"),
    "tokens are a list": ("rubbish", "tokens are list, not one row of torch.int64"),
    "mask is none": ("rubbish", "loss_mask are NoneType"),
    "mask of numbers": ("rubbish", "torch.float32"),
    "beyond the vocabulary": ("rubbish", "outside the vocabulary of 272"),
    "infinite logprob": ("rubbish", "not finite"),
    "reward of text": ("rubbish", "the reward a is a str"),
    "status": ("rubbish", "not completed or truncated"),
    "info": ("rubbish", "cannot be read"),
    "turns": ("rubbish", "is not {by: model or environment"),
}


def test_odd_functions() -> None:
    started = time.monotonic()
    samples = run(conversation(f"{HERE}.odd", timeout_seconds=20.0), list(FUNCTIONS), budget=1000)
    for (text, expected), sample in zip(FUNCTIONS.items(), samples, strict=True):
        if expected is None:
            assert sample.status is Status.completed, (text, sample.finish_reason)
        else:
            assert sample.info["failed"] == expected[0] and expected[1] in sample.finish_reason, (text, sample.finish_reason)
    assert time.monotonic() - started < 4.0  # nobody waits for the task that was left behind
    assert isinstance(samples[list(FUNCTIONS).index("board")].info["board"], str)  # a checkpoint can hold it


def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCKED_SECONDS", "SILENT_SECONDS", "CLOSE_SECONDS"):
        monkeypatch.setattr(foreign, name, 0.4)
    monkeypatch.setattr(feed, "WATCH_SECONDS", 0.1)


async def blocks_in_c(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    """What `requests.get` without a timeout does: no await, and no Python code that could be interrupted."""
    if prompt.text == "blocks":
        time.sleep(6)
    return await plain(engine, prompt, context)


def test_a_call_that_blocks_the_loop_for_good_costs_its_sample_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    soon(monkeypatch)
    found = run(conversation(f"{HERE}.blocks_in_c"), ["fine", "blocks", "fine", "fine", "fine", "fine"], samples=2)
    assert [sample.info.get("failed") for sample in found] == [None] * 2 + ["timeout"] * 2 + [None] * 8
    assert "without an await, at" in found[2].finish_reason and "test_turns_odd.py:" in found[2].finish_reason
    assert [(sample.prompt_id, sample.sample_index) for sample in found] == [(f"p{i}", j) for i in range(6) for j in range(2)]


def test_a_function_that_always_blocks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    soon(monkeypatch)
    monkeypatch.setattr(conversations, "MAX_HELD", 2)
    found = run(conversation(f"{HERE}.blocks_in_c"), ["fine"] + ["blocks"] * 40)
    reasons = {sample.finish_reason.partition(",")[0] for sample in found[1:]}
    assert all(sample.status is Status.failed for sample in found[1:]) and len(found) == 41
    assert any("not done when 2 conversations had held the event loop" in reason for reason in reasons)


class Sleepy(Odd):
    def __init__(self) -> None:
        time.sleep(1000)


def test_a_constructor_that_sleeps_costs_its_own_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    (sample,) = run(conversation(environment=f"{HERE}.Sleepy", timeout_seconds=0.5), ["fine"])
    assert sample.info["failed"] == "timeout"


def test_a_call_in_another_thread_that_hangs_does_not_keep_the_program_from_ending(tmp_path: Path) -> None:
    program = tmp_path / "hangs.py"
    program.write_text(
        "import asyncio, time\n"
        "from runner.foreign import UserLoop\n"
        "loop = UserLoop('test')\n"
        "loop.call(loop.spawn, asyncio.to_thread(time.sleep, 1000), 0)\n"
        "time.sleep(0.3)\nloop.close()\nprint('ended')\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout == "ended\n", done.stderr


async def yields(engine: Engine, prompt: Prompt, context: Context) -> Any:
    yield None


class Gymnasium:
    def reset(self, prompt: Prompt) -> None: ...


def test_what_can_be_said_before_a_run() -> None:
    with pytest.raises(UserError, match="yields"):
        conversations.user_code(conversation(f"{HERE}.yields"))
    with pytest.raises(UserError, match="has no step"):
        conversations.user_code(conversation(environment=f"{HERE}.Gymnasium"))
    (problem,) = problems("+task.rewards.tsk.weight=0.5")
    assert problem.key == "task.rewards.tsk" and "weight alone" in problem.problem
    compose.load(["+task.rewards.task.weight=0.5"])


def test_pixels_that_samples_share_cannot_be_drawn_into() -> None:
    from runner.models.families.qwen3_vl import tower

    pixels, small = np.zeros((16, 16, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    image = PlacedImage(small, 0, tower(composed("model=tiny_vlm").model))
    prompt = Prompt("p", "", (0,), "", images=(image,), originals=(pixels,))
    for shared in (prompt.originals[0], prompt.images[0].pixels):
        with pytest.raises(ValueError, match="read-only"):
            shared[0, 0] = 1


class Tool:
    name, description, parameters = "tool", "does things", {"x": {"type": "number"}}

    def call(self, **arguments: Any) -> str:
        return "done"


class NoName(Tool):
    name = 7  # type: ignore[assignment]


class Listed(Tool):
    parameters = ["x"]  # type: ignore[assignment]


class NoJson(Tool):
    parameters = {"x": {"type": float}}  # type: ignore[dict-item]


class Wants(Tool):
    required = ("x", "y")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NoName", "the name 7"),
        ("Listed", "no JSON schema properties"),
        ("NoJson", "schema that is no JSON"),
        ("Wants", "requires y"),
    ],
)
def test_tools_with_a_bad_schema_are_said_before_a_run(name: str, said: str) -> None:
    assert list(ToolEnvironment.check_arguments(tools=[f"{HERE}.Tool"])) == []
    (problem,) = ToolEnvironment.check_arguments(tools=[f"{HERE}.{name}"])
    assert said in problem.problem and problem.key == "task.rollout.arguments.tools"


# ---- images


def broken_png() -> Image.Image:
    file = io.BytesIO()
    Image.new("RGB", (200, 200), (3, 4, 5)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:60] + b"x" * 300))


def closed() -> Image.Image:
    image = Image.new("RGB", (20, 20))
    image.close()
    return image


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_images_of_every_mode_become_whole_tokens(mode: str) -> None:
    cfg = compose.load_config(["model=tiny_vlm"])
    pictures = Pictures(processor(cfg), 4, 1, 512)
    for size in ((1, 1), (20, 13), (1, 150)):
        pixels = pictures.pixels(Image.new(mode, size))
        assert pixels.dtype == np.uint8 and not pixels.shape[0] % 8 and not pixels.shape[1] % 8 and pixels.size <= 512 * 3


@pytest.mark.parametrize("make", [broken_png, closed, lambda: Image.new("1", (20_000, 20_000))])
def test_images_that_cannot_be_shown(make: Callable[[], Image.Image]) -> None:
    pictures = Pictures(processor(compose.load_config(["model=tiny_vlm"])), 4, 1, 512)
    with pytest.raises(Failed) as caught:
        pictures.pixels(make())
    assert caught.value.kind == "image"


# ---- rewards


async def holds(prompt: Prompt, text: str, sample: Sample) -> float:
    if text == "sleeps":
        time.sleep(6)
    if text == "cancels":
        raise asyncio.CancelledError
    while text == "never ends":
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            continue
    return {"text": "1.0", "nan": float("nan")}.get(text, 2.0)  # type: ignore[return-value]


def test_odd_async_rewards_cost_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    soon(monkeypatch)
    rows = items("fine", "cancels", "text", "nan", "never ends")
    (warning,) = parts.add({"odd": RewardConfig(_target_=f"{HERE}.holds", timeout_seconds=0.3)}, rows)
    assert [sample.reward for *_, sample in rows] == [3.0, None, None, None, None] and "failed for 4 of 5" in warning
    rows = items("fine", "sleeps", "fine")
    (warning,) = parts.add({"odd": RewardConfig(_target_=f"{HERE}.holds", timeout_seconds=0.3)}, rows)
    assert rows[1][2].reward is None and "no answer within" in warning


class Rubbish(http.server.BaseHTTPRequestHandler):
    """Answers as its path says."""

    posts = 0

    def do_POST(self) -> None:
        Rubbish.posts += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        what = self.path[1:]
        if what == "no-http":
            self.wfile.write(b"\x00\xff rubbish\r\n\r\n")
            return
        self.send_response(302 if what == "redirect" else 200)
        if what == "redirect":
            self.send_header("Location", "/fine")
        body = BODIES.get(what, b'{"rewards": [1]}')
        if what == "cut":
            self.send_header("Content-Length", str(len(body) + 10))
        self.end_headers()
        for drop in [body] if what != "drops" else [b" "] * 100 + [body]:
            try:
                self.wfile.write(drop)
                time.sleep(0.05 if what == "drops" else 0)
            except OSError:
                return

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None: ...


BODIES = {
    "html": b"<html>",
    "deep": b"[" * 10**5,
    "long": b'{"rewards": [1, 2]}',
    "list": b"[1]",
    "nan": b'{"rewards": [NaN]}',
    "huge": b'{"rewards": [' + b"9" * 400 + b"]}",
    "text": b'{"rewards": ["1"]}',
    "null": b'{"rewards": [null]}',
    "bytes": b"\xff\xfe",
    "cut": b'{"rewards": [1',
}


@pytest.fixture(scope="module")
def rubbish() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rubbish)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("what", [*BODIES, "no-http", "redirect", "drops"])
def test_a_service_that_answers_rubbish_costs_its_samples(what: str, rubbish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(service, "BACKOFF_SECONDS", 0.01)
    before = Rubbish.posts
    rows = items("a")
    (warning,) = parts.add({"judge": RewardConfig(url=f"{rubbish}/{what}", max_retries=1, timeout_seconds=0.5)}, rows)
    assert rows[0][2].reward is None and "reward judge failed for 1 of 1" in warning
    assert Rubbish.posts - before == (1 if what == "redirect" else 2)
    assert what != "fine" and len(warning) < 500


def test_a_weight_of_a_part_that_nobody_gives_is_told_once() -> None:
    from test_turns import EchoPool

    from runner.models.tokenizer import byte_tokenizer
    from runner.run.collect import Collector

    cfg, warnings = compose.load_config(
        ["task=calculator", "task.rollout._target_=" + f"{HERE}.plain", "task.rollout.environment=null",
         "algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=2", "+task.rewards.envronment.weight=2"]
    ), list[str]()  # fmt: skip

    class Two:
        name = "two"

        def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
            return [Prompt(f"p{i}", "text", (20, 21), "a") for i in range(2)]

    tokenizer = byte_tokenizer()
    collector = Collector(
        cfg, Two(), EchoPool(), tokenizer.decode, (1,), lambda: False, warnings.append, tokenizer  # type: ignore[arg-type]
    )  # fmt: skip
    for step in range(2):
        assert collector.collect(step).metrics["rollout/failed"] == 0
    (warning,) = warnings
    assert "weighs envronment, which no sample of step 0 has; its parts: environment" in warning


def test_reading_checks_leave_good_samples_alone() -> None:
    (sample,) = run(conversation(f"{HERE}.plain"), ["fine"])
    assert (
        sample.status is Status.completed and isinstance(sample.tokens, torch.Tensor) and sample.rewards == {"environment": 1.0}
    )
