"""`runner show` and the report's samples: what a person reads of a conversation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runner.cli.main import dispatch
from runner.data import Batch, Sample, Status
from runner.errors import UserError
from runner.run import samples
from runner.tracking.report import write_report
from runner.trainer.protocol import StepResult

TURNS = [
    {"by": "model", "text": "12+34", "start": 0, "stop": 6, "finish": "stop", "notes": {"tool_calls": 1}},
    {"by": "environment", "text": "46;<b>", "start": 6, "stop": 9},
    {"by": "model", "text": "=46", "start": 9, "stop": 13, "finish": "stop", "notes": {"rewards": {"answer": 1.0}}},
]


def rows() -> list[dict[str, object]]:
    mask = torch.tensor([True] * 6 + [False] * 3 + [True] * 4)
    engine, trainer = torch.zeros(13), torch.zeros(13)
    trainer[2], trainer[7], trainer[10] = 0.5, 9.0, 0.01  # place 7 is the environment's
    sample = Sample("p", 0, torch.arange(20, 40), 13, mask, engine, Status.completed, "done", reward=1.0, rewards={"answer": 1.0})
    sample.info = {"prompt": "12+34=", "text": "12+3446;=46", "turns": TURNS}
    update = StepResult({}, old_logprobs=[trainer], old_version=0)
    return samples.rows(Batch([sample], [torch.full((13,), 0.25)], 1.0), update, lambda ids: f"t{ids[0]}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "rollout/raw_reward": 1.0, "reward/answer": 1.0}) + "\n")
    (tmp_path / "rollouts" / "step_0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return tmp_path


def test_a_row_names_the_models_tokens_on_which_both_sides_disagree_most() -> None:
    (row,) = rows()
    assert row["advantage"] == 0.25 and row["rewards"] == {"answer": 1.0} and row["turns"] == TURNS
    assert row["worst"] == [
        {"position": 2, "id": 29, "token": "t29", "engine": 0.0, "trainer": 0.5},
        {"position": 10, "id": 37, "token": "t37", "engine": 0.0, "trainer": 0.01},
    ]


def test_it_is_shown_on_a_terminal_and_on_pages(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["show", str(run), "1", "0"]) == 0
    text = capsys.readouterr().out
    for part in (
        "12+34=",
        "46;<b>",
        "=46",
        "reward/answer 1",
        "advantage 0.25",
        '"tool_calls": 1',
        "engine 0.0000  trainer 0.5000",
    ):
        assert part in text, part
    assert dispatch(["show", str(run), "--out", str(run / "page.html")]) == 0
    for page in (run / "page.html", write_report(run)):
        html = page.read_text()
        assert "46;&lt;b&gt;" in html and "46;<b>" not in html and "logprobs apart most" in html


def test_what_is_not_there(run: Path) -> None:
    for words, message in (
        ([], "needs a run"),
        ([str(run), "7"], "no samples of step 7"),
        ([str(run), "1", "5"], "keeps 1 samples"),
        ([str(run), "one"], "is no step"),
        ([str(run), "-1", "2"], r"'-1' is no step(?s:.*)a step from 1 to 1"),
        ([str(run), "1", "-2"], r"'-2' is no sample(?s:.*)a number from 0 to 0"),
        ([str(run), "0"], "no samples of step 0"),
    ):
        with pytest.raises(UserError, match=message):
            dispatch(["show", *words])
