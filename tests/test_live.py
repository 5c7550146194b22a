"""`runner watch`: what a browser gets while a run goes on, and who gets nothing."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer

from runner.__main__ import main
from runner.errors import UserError
from runner.tracking import live, page, timeline
from runner.tracking.folder import write_status
from runner.tracking.timeline import Span
from runner.tracking.tracker import JsonlTracker

TOKEN = "a-token"
TOKENS = [["12", -0.5, -0.5], ["<b>", -0.1, -0.4], ["7", -1.0, -1.05], ["said"]]
SPANS = [
    Span("driver", "rollout", 100.0, 101.0),
    Span("trainer rank 1", "update", 101.0, 102.0),
    Span("engine 0", "generation", 100.0, 100.5),
]


def run_at(path: Path, steps: int = 2) -> JsonlTracker:
    tracker = JsonlTracker(path)
    for step in range(steps):
        do(tracker, step)
    write_status(path, "running", step=steps)
    return tracker


def do(tracker: JsonlTracker, step: int) -> None:
    tracker.log_samples(step, [{"prompt": "3+4=", "response": "12<b>7said", "reward": 1.0, "tokens": TOKENS}])
    tracker.log_timeline(step, SPANS)
    tracker.log(step, {"rollout/raw_reward": step / 10})


def asked(folder: Path, ask: Callable[[TestClient[Any, Any], live.Server], Coroutine[Any, Any, None]]) -> None:
    """`ask` a server of this folder, whose follower runs."""

    async def go() -> None:
        server = live.Server(live.LivePage(folder), TOKEN)
        async with TestClient(TestServer(server.application())) as client:
            following = asyncio.create_task(server.follow())
            try:
                await asyncio.wait_for(ask(client, server), 20)
            finally:
                following.cancel()
                await server.end()

    asyncio.run(go())


def test_a_reader_is_told_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.02)
    tracker = run_at(tmp_path)

    async def ask(client: TestClient[Any, Any], server: live.Server) -> None:
        text = await (await client.get(f"/{TOKEN}/")).text()
        assert '<svg class="chart"' in text and "Timeline" in text and "trainer rank 1" in text and 'href="step/2"' in text
        assert "Alarms" not in text
        async with client.get(f"/{TOKEN}/events") as stream:
            assert stream.content_type == "text/event-stream"
            assert await stream.content.readuntil(b"\n\n") == b"id: 1\nevent: drawn\ndata: 1\n\n"
            do(tracker, 2)
            tracker.event("watch_warn", "kl: too <high>\nlikely cause: x\ntry: trainer.optimizer.lr=1e-5", {"step": 2})
            while 'href="step/3"' not in (text := await (await client.get(f"/{TOKEN}/body")).text()) or "Alarms" not in text:
                assert (await stream.content.readuntil(b"\n\n")).startswith(b"id: ")
            assert "kl: too &lt;high&gt;" in text and "try: trainer.optimizer.lr=1e-5" in text
            assert text.index("Alarms") < text.index("Timeline")
            await server.end()
            await stream.content.read()  # the stream ends with the server

    asked(tmp_path, ask)


def test_samples_are_shown_token_by_token(tmp_path: Path) -> None:
    run_at(tmp_path)

    async def ask(client: TestClient[Any, Any], server: live.Server) -> None:
        text = await (await client.get(f"/{TOKEN}/step/2")).text()
        cells = re.findall(r'<span class="token (\w*)" tabindex="0" title="([^"]*)">(.*?)</span>', text)
        assert [kind for kind, _, _ in cells] == ["", "far", "near", "other"]
        assert cells[1][1:] == ("1: engine -0.1000, trainer -0.4000", "&lt;b&gt;")
        assert (await client.get(f"/{TOKEN}/step/3")).status == 404 and (await client.get(f"/{TOKEN}/step/0")).status == 404

    asked(tmp_path, ask)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (f"/{TOKEN}/", {}, 200),
        (f"/{TOKEN}/", {"Host": "localhost:9"}, 200),  # the other end of a tunnel
        (f"/{TOKEN}/", {"Host": "[::1]:9"}, 200),
        ("/a-toke/", {}, 403),
        ("/", {}, 403),
        ("/%C3%A9/", {}, 403),
        ("/a-token", {}, 404),
        (f"/{TOKEN}/../../etc/passwd", {}, 403),
        (f"/{TOKEN}/status.json", {}, 404),
        (f"/{TOKEN}/", {"Host": "rebound.example"}, 403),
        (f"/{TOKEN}/", {"Host": "127.0.0.1.example"}, 403),
        (f"/{TOKEN}/", {"Host": "[half"}, 403),
        (f"/{TOKEN}/body", {"Origin": "http://elsewhere.example"}, 403),
        (f"/{TOKEN}/body", {"Origin": "null"}, 403),
        (f"/{TOKEN}/body", {"Host": "127.0.0.1:9", "Origin": "http://127.0.0.1:9"}, 200),
        (f"/{TOKEN}/body", {"Host": "127.0.0.1:9", "Origin": "http://127.0.0.1:8"}, 403),
    ],
)
def test_who_gets_an_answer(path: str, headers: dict[str, str], status: int, tmp_path: Path) -> None:
    run_at(tmp_path)

    async def ask(client: TestClient[Any, Any], server: live.Server) -> None:
        async with client.get(path, headers=headers) as answer:
            assert answer.status == status
            if status == 200:
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy
                assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert (await client.post(f"/{TOKEN}/")).status == 405

    asked(tmp_path, ask)


def test_pages_carry_no_script_but_ours() -> None:
    for is_live in (False, True):
        text = page.document("t", "<p>x</p>", live=is_live)
        (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
        (digest,) = re.findall(r"script-src ('[^']*')$" if not is_live else r"script-src ('[^']*');", policy)
        assert digest.startswith("'sha256-") and ("connect-src 'self'" in policy) is is_live
    assert page.policy() != page.policy(live=True)


def test_what_cannot_be_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "nothing")]) == 2 and "no run named" in capsys.readouterr().err
    assert main(["watch"]) == 2 and "watch needs one run" in capsys.readouterr().err
    run_at(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind((live.HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["watch", str(tmp_path / "run"), "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"port {port} is in use" in said and "--port 0 takes a free one" in said
    assert main(["watch", str(tmp_path / "run"), "--port", "70000"]) == 2 and "is no port" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n{}\n")
    assert main(["watch", str(tmp_path / "run")]) == 2 and "line 1 is damaged" in capsys.readouterr().err


def test_a_folder_that_is_damaged_later_says_so(tmp_path: Path) -> None:
    run_at(tmp_path)
    drawn = live.LivePage(tmp_path)
    assert not drawn.refresh()
    (tmp_path / "timeline.jsonl").write_text('{"step": 0, "spans": [["driver", "rollout", 1, "x"]]}\n{}\n')
    assert drawn.refresh() and drawn.version == 2 and "timeline.jsonl: line 1 is damaged" in drawn.body
    run_at(tmp_path)
    assert drawn.refresh() and "<svg" in drawn.body


def test_ctrl_c_ends_it_and_the_folder_is_as_it_was(tmp_path: Path) -> None:
    run_at(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "runner", "watch", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/[\w-]{32}/$", line.strip())

        async def read() -> None:
            async with ClientSession() as session, session.get(address) as answer, session.get(f"{address}events") as stream:
                assert answer.status == 200 and await stream.content.readuntil(b"\n\n")
                process.send_signal(signal.SIGINT)  # with a reader of events
                await stream.content.read()

        asyncio.run(asyncio.wait_for(read(), 30))
        assert process.wait(20) == 0 and process.stderr.read() == ""
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# ---- the timeline


def test_engines_are_busy_while_they_have_a_sample() -> None:
    class Served:
        def __init__(self, *served: tuple[str, float, float]) -> None:
            self.served = list(served)

    samples: Any = [Served(("engine 1", 0, 2)), Served(("engine 1", 1, 3), ("engine 0", 5, 6)), Served(("engine 1", 4, 5))]
    assert timeline.served(samples) == [
        Span("engine 0", "generation", 5, 6),
        Span("engine 1", "generation", 0, 3),
        Span("engine 1", "generation", 4, 5),
    ]


def test_lanes_are_drawn_to_scale_and_in_order() -> None:
    spans = [
        Span("engine 10", "generation", 10.0, 12.0),
        Span("engine 2", "generation", 11.0, 14.0),
        Span("driver", "<x>", 10.0, 14.0),
    ]
    text = timeline.draw([(4, spans)])
    assert re.findall(r'text-anchor="end">(.*?)</text>', text) == ["driver", "engine 2", "engine 10"]
    bars = {
        title: (float(x), float(w))
        for x, w, title in re.findall(r'<rect x="([\d.]+)" .*?width="([\d.]+)".*?<title>(.*?)</title>', text)
    }
    whole = bars["driver, step 5: &lt;x&gt;, 4 s"]
    assert bars["engine 10, step 5: generation, 2 s"] == (whole[0], pytest.approx(whole[1] / 2, abs=0.1))
    assert bars["engine 2, step 5: generation, 3 s"][0] == pytest.approx(whole[0] + whole[1] / 4, abs=0.1)
    assert timeline.draw([]) == "" and timeline.draw([(0, [])]) == ""


def test_a_rewound_run_does_its_timeline_again(tmp_path: Path) -> None:
    tracker = run_at(tmp_path, steps=3)
    tracker.rewind(1)
    assert [json.loads(line)["step"] for line in (tmp_path / "timeline.jsonl").read_text().splitlines()] == [0]
    do(tracker, 1)
    assert timeline.read(tmp_path) == [(0, SPANS), (1, SPANS)]
    (tmp_path / "timeline.jsonl").write_text('{"step": 0, "spans": [["driver", "rollout", 1]]}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        timeline.read(tmp_path)


@pytest.mark.parametrize(
    "span", [[1, 2], ["driver", "rollout", 1e12, 1], ["driver", "rollout", -1, 1], ["driver", "rollout", "1", 2]]
)
def test_a_timeline_that_makes_no_sense_is_damaged(span: list[Any], tmp_path: Path) -> None:
    (tmp_path / "timeline.jsonl").write_text(json.dumps({"step": 0, "spans": [span]}) + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        timeline.read(tmp_path)
    (tmp_path / "timeline.jsonl").write_text(f'{{"step": 0, "spans": [["driver", "rollout", 1{"0" * 400}, 2]]}}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        timeline.read(tmp_path)


def test_odd_lanes_and_clocks_that_were_set_back_are_drawn(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.log_timeline(0, [Span("", "rollout", 5.0, 2.0), Span(f"engine {'9' * 5000}", "update", 5.0, 2.0)])
    assert timeline.draw(timeline.read(tmp_path)).count("<rect") == 2


def test_steps_before_a_long_pause_are_not_drawn(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for step, begin in enumerate((0, 7, 100, 102)):  # two seconds each
        tracker.log_timeline(step, [Span("driver", "rollout", begin, begin + 2.0)])
        shown = [number for number, _ in timeline.read(tmp_path)]
        assert shown == {0: [0], 1: [0, 1], 2: [2], 3: [2, 3]}[step]
