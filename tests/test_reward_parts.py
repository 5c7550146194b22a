"""Rewards of several parts: functions, async functions, and a service behind HTTP that fails now and then."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from runner.config import compose
from runner.config.schema import RewardConfig
from runner.data import Sample, Status
from runner.errors import UserErrors
from runner.tasks import parts, service
from runner.tasks.protocol import Prompt

HERE = __name__
LINE = re.compile(r"\(\S*test_reward_parts\.py:\d+\)")  # of the function that raised


def length(prompt: Prompt, text: str, sample: Sample) -> float:
    return float(len(text))


async def slow(prompt: Prompt, text: str, sample: Sample) -> float:
    if text == "bad":
        raise ValueError("no")
    if text == "exit":
        raise SystemExit(3)
    return 2.0


def items(*texts: str) -> list[tuple[Prompt, str, Sample]]:
    found = []
    for index, text in enumerate(texts):
        tokens, mask = torch.tensor([1, 2]), torch.ones(1, dtype=torch.bool)
        sample = Sample(f"p{index}", 0, tokens, 1, mask, torch.zeros(1), Status.completed, "stop", reward=1.0)
        sample.rewards = {"task": 1.0}
        found.append((Prompt(f"p{index}", "question", (1,), "answer"), text, sample))
    return found


def test_parts_are_weighed_and_add_up() -> None:
    rows = items("abc", "bad")
    configured = {
        "task": RewardConfig(weight=0.5),
        "length": RewardConfig(weight=0.1, _target_=f"{HERE}.length"),
        "slow": RewardConfig(_target_=f"{HERE}.slow"),
    }
    (warning,) = parts.add(configured, rows)
    first, second = (sample for *_, sample in rows)
    assert first.rewards == {"task": 0.5, "length": pytest.approx(0.3), "slow": 2.0} and first.reward == pytest.approx(2.8)
    assert second.reward is None and "slow failed for 1 of 2 samples; first: ValueError: no (" in warning
    assert LINE.search(warning), warning


def test_a_part_that_exits_costs_its_own_sample_alone() -> None:
    rows = items("exit", "abc")
    (warning,) = parts.add({"slow": RewardConfig(_target_=f"{HERE}.slow")}, rows)
    assert [sample.reward for *_, sample in rows] == [None, 3.0] and "SystemExit: 3 (" in warning
    assert LINE.search(warning), warning


class Judge(http.server.BaseHTTPRequestHandler):
    answers: list[Any] = []  # codes to fail with, first
    seen: list[tuple[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.seen.append((self.headers.get("Authorization", ""), body))
        code = Judge.answers.pop(0) if Judge.answers else 200
        text = json.dumps({"rewards": [float(len(item["response"])) for item in body["items"]]}).encode()
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text if code == 200 else b"busy")

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(service, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("JUDGE_KEY", "a secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Judge.answers, Judge.seen = [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/score"
    server.shutdown()
    server.server_close()


def test_a_service_is_asked_in_batches_with_its_key_and_again_after_a_failure(judge: str) -> None:
    Judge.answers = [503, 429]
    rows = items("a", "bb", "ccc")
    part = RewardConfig(url=judge, batch_size=2, key_variable="JUDGE_KEY", timeout_seconds=30)
    assert parts.add({"judge": part}, rows) == []
    assert [sample.rewards["judge"] for *_, sample in rows] == [1.0, 2.0, 3.0]
    assert {key for key, _ in Judge.seen} == {"Bearer a secret"} and len(Judge.seen) == 4  # two batches, two failures
    assert sorted(len(body["items"]) for _, body in Judge.seen)[-1] == 2


def test_a_service_that_never_answers_costs_its_samples(judge: str) -> None:
    Judge.answers = [500] * 10
    rows = items("a")
    (warning,) = parts.add({"judge": RewardConfig(url=judge, max_retries=1, timeout_seconds=30)}, rows)
    assert rows[0][2].reward is None and "answered 500" in warning and len(Judge.seen) == 2


def test_what_is_refused_before_a_run() -> None:
    wrong = {
        "both": RewardConfig(_target_="a.b", url="http://127.0.0.1/"),
        "gone": RewardConfig(_target_="no_such_module.reward"),
        "file": RewardConfig(url="file:///etc/passwd"),
        "secret": RewardConfig(url="http://me:password@127.0.0.1/"),
        "key": RewardConfig(url="http://127.0.0.1/", key_variable="RUNNER_NO_SUCH_KEY"),
    }
    assert [error.key for error in parts.check(wrong)] == [
        "task.rewards.both", "task.rewards.gone._target_", "task.rewards.file.url", "task.rewards.secret.url",
        "task.rewards.key.key_variable",
    ]  # fmt: skip
    with pytest.raises(UserErrors, match="must be at most"):
        compose.load(["+task.rewards.a.weight=1e9"])
