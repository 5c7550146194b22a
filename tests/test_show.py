"""`runner show` and the report's samples: what a person reads of a conversation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runner.cli.main import dispatch
from runner.data import Batch, Sample, Status
from runner.errors import UserError
from runner.models.families.qwen3_vl import tower
from runner.models.images import PlacedImage
from runner.run import samples
from runner.tracking import pictures as pictured
from runner.tracking.folder import read_jsonl
from runner.tracking.report import write_report
from runner.tracking.tracker import JsonlTracker
from runner.trainer.protocol import StepResult
from tests.configs import composed

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


# ---- images


def seen() -> tuple[Batch, StepResult]:
    """Two samples of one prompt with an image; the first was shown another one, and the one after its last turn was not seen."""
    shape = tower(composed("model=tiny_vlm").model)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    asked, crop = PlacedImage(pixels, 2, shape), PlacedImage(255 - pixels[:8, :8], 20, shape)
    found = []
    for number, images in enumerate([(asked, crop), (asked,)]):
        turns = [
            {"by": "model", "text": "zoom 3", "start": 0, "stop": 3, "finish": "stop"},
            {"by": "environment", "text": "<image>", "images": 1, "start": 3, "stop": 6},
            {"by": "model", "text": "=4", "start": 6, "stop": 8, "finish": "stop"},
            {"by": "environment", "text": "<image>", "images": 1, "start": 8, "stop": 11, "left_out": True},
        ]
        sample = Sample(
            "p", number, torch.arange(28), 8, torch.ones(8, dtype=torch.bool), torch.zeros(8), Status.completed, "done"
        )
        sample.reward, sample.images = 1.0, images
        sample.info = {"prompt": "<image>how many?", "text": "", "turns": turns if number == 0 else turns[2:3]}
        found.append(sample)
    advantages = torch.tensor([0.5] * 6 + [1.0] * 2)
    return Batch(found, [advantages, torch.zeros(8)], 1.0), StepResult({}, [torch.zeros(8)] * 2, old_version=0)


@pytest.fixture
def run_with_images(tmp_path: Path) -> Path:
    batch, update = seen()
    tracker = JsonlTracker(tmp_path)
    tracker.log_samples(0, samples.rows(batch, update, str), samples.pictures(batch))
    tracker.log(0, {"rollout/raw_reward": 1.0})
    return tmp_path


def test_images_lie_beside_the_rows_each_once_and_bit_for_bit(run_with_images: Path) -> None:
    batch, _ = seen()
    first, second = read_jsonl(run_with_images / "rollouts" / "step_0.jsonl")
    assert first["images"] == [
        {"file": "0.png", "place": 2, "tokens": [2, 3]}, {"file": "1.png", "place": 20, "tokens": [1, 1]}
    ]  # fmt: skip
    assert second["images"] == first["images"][:1]
    assert sorted(path.name for path in (run_with_images / "rollouts" / "step_0").iterdir()) == ["0.png", "1.png"]
    for image, name in zip(batch.samples[0].images, ("0.png", "1.png"), strict=True):
        with Image.open(run_with_images / "rollouts" / "step_0" / name) as opened:
            assert np.array_equal(np.asarray(opened), image.pixels)
    turns = [turn.get("advantage") for turn in first["turns"]]
    assert turns == [0.5, None, 1.0, None] and "advantage" not in second["turns"][0]
    JsonlTracker(run_with_images, 0, resumed=True)  # the step is done again
    assert list((run_with_images / "rollouts").iterdir()) == []


def test_pages_show_images_in_their_turns_and_need_no_other_file(run_with_images: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert dispatch(["show", str(run_with_images), "1", "0", "--out", str(page)]) == 0
    text = page.read_text()
    first, second = (match.start() for match in re.finditer('src="data:image/png;base64,', text))
    assert text.index("how many?") < first < text.index("zoom 3") < second < text.index("=4") and "img-src data:" in text
    report = write_report(run_with_images).read_text()
    assert report.count('src="data:image/png;base64,') == 3  # the prompt's twice


def test_a_terminal_draws_images_and_a_pipe_names_them(run_with_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["show", str(run_with_images), "1", "0"]) == 0
    told = capsys.readouterr().out
    assert "step_0/0.png" in told and told.index("zoom 3") < told.index("step_0/1.png") < told.index("=4")
    drawn = pictured.drawn(run_with_images / "rollouts" / "step_0" / "1.png")
    assert drawn.plain.count("▀") == 4 * 8
    (color,) = {str(span.style) for span in drawn.spans if span.start == drawn.plain.index("▀")}
    batch, _ = seen()
    upper, lower = batch.samples[0].images[1].pixels[:2, 0]
    assert color == f"#{bytes(upper).hex()} on #{bytes(lower).hex()}"


def test_files_that_are_not_ours_are_not_shown(run_with_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_with_images / "rollouts" / "step_0.jsonl"
    row = read_jsonl(rows)[0] | {"images": [{"file": "../../../etc/passwd"}, {"file": "7.png"}, 3, {"file": "0.png"}]}
    rows.write_text(json.dumps(row) + "\n")
    (run_with_images / "rollouts" / "step_0" / "0.png").write_bytes(b"no image")
    assert dispatch(["show", str(run_with_images)]) == 0
    assert "passwd" not in capsys.readouterr().out
    assert "cannot be read" in pictured.drawn(run_with_images / "rollouts" / "step_0" / "0.png").plain


def test_large_images_are_kept_small(tmp_path: Path) -> None:
    pictured.write(tmp_path, 3, {pictured.name(0, large := np.zeros((1000, 2000, 3), np.uint8)): large})
    with Image.open(tmp_path / "step_3" / "0.jpg") as opened:
        assert opened.size == (256, 128)
