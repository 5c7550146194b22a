"""task=geo3k: geometry problems with pictures from files and from text, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_vision import IMAGE, config, noise_image, processor

from runner.errors import UserError
from runner.models.build import load_tokenizer
from runner.models.pictures import open_rgb
from runner.tasks.geo3k import Geo3kTask


def png(height: int = 30, width: int = 50, seed: int = 0, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise_image(height, width, seed)).convert(mode).save(file, "PNG")
    return file.getvalue()


def hollow_png(side: int) -> bytes:
    """Less than a hundred bytes that say they are side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def geo3k(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> Geo3kTask:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config("task=geo3k", f"task.train_path={path}", f"task.eval_path={path}", "warm_start.enabled=false", *overrides)
    return Geo3kTask(cfg.task, load_tokenizer(cfg.model), processor(cfg))  # type: ignore[arg-type]


def test_geometry_problems_from_files_and_from_text(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.png").write_bytes(png(seed=1))
    (tmp_path / "d" / "2.png").write_bytes(png(32, 32, seed=3))
    text = base64.b64encode(png(200, 200, seed=2)).decode()
    task = geo3k(
        tmp_path,
        [
            {"problem": "<image>Find x.", "answer": "12", "image": "d/1.png"},
            {"problem": "Find y.", "answer": 0.5, "image_base64": text},
            {"problem": "See <image>. Find z.", "answer": "\\frac{3}{4}", "images": ["d/1.png"]},
            {"problem": "Is <image> like <image>?", "answer": "1", "images": ["d/1.png", "d/2.png"]},
            {"problem": "Same?", "answer": "1", "images": ["d/1.png", "d/2.png"]},
        ],
    )
    first, second, third, several, before = task.eval_prompts(9)
    one, two, three = (prompt.images[0] for prompt in (first, second, third))
    assert one.grid == (4, 6) and two.grid == (8, 8)  # 30 x 50 enlarged, 200 x 200 reduced
    assert np.array_equal(one.pixels, three.pixels)
    for prompt, count in zip((first, second, third, several, before), (1, 1, 1, 2, 2), strict=True):
        places = [i for i, token in enumerate(prompt.tokens) if token == IMAGE]
        assert places == [image.start + i for image in prompt.images for i in range(image.tokens)] and len(prompt.images) == count
        for image in prompt.images:  # between the marks of vision
            assert prompt.tokens[image.start - 1] == 2 and prompt.tokens[image.start + image.tokens] == 3
    assert first.text == "<image>Find x. Answer in \\boxed{}." and three.start > one.start
    assert [image.grid for image in several.images] == [(4, 6), (4, 4)] and before.text.startswith("<image><image>Same?")
    assert task.reward(first, "so \\boxed{12.0}") == 1.0 and task.reward(first, "12") == 0.0
    assert task.reward(second, "Answer: 1/2") == 1.0 and task.reward(third, "\\boxed{0.75}") == 1.0
    drawn = task.train_prompts(0, 3, 0) + task.train_prompts(0, 3, 1)
    assert all(prompt.images for prompt in drawn)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "1", "image": "1.png"}, "no field 'problem'"),
        ({"problem": "x", "answer": "", "image": "1.png"}, "`answer` is empty"),
        ({"problem": "x", "answer": "1"}, "0 images"),
        ({"problem": "x", "answer": "1", "images": ["1.png"], "image_base64": "aa"}, "without `image_base64`"),
        ({"problem": "<image>", "answer": "1", "images": ["1.png", "1.png"]}, "names 1 images, the line has 2"),
        ({"problem": "x", "answer": "1", "images": "1.png"}, "must be a list"),
        ({"problem": "x", "answer": "1", "image": {"bytes": ""}}, "path of a file"),
        ({"problem": "<image><image>", "answer": "1", "image": "1.png"}, "names 2 images"),
        ({"problem": "x", "answer": "1", "image": "2.png"}, "cannot read image '2.png'"),
        ({"problem": "x", "answer": "1", "image": "."}, "cannot read image '.'"),
        ({"problem": "x", "answer": "1", "image": "text.png"}, "none of PNG"),
        ({"problem": "x", "answer": "1", "image": "cut.png"}, "damaged"),
        ({"problem": "x", "answer": "1", "image": "large.png"}, "8000 x 8000"),
        ({"problem": "x", "answer": "1", "image": "huge.png"}, "decompression bomb"),
        ({"problem": "x", "answer": "1", "image_base64": "!!"}, "not base64"),
        ({"problem": "x", "answer": "1", "image": "long.png"}, "200 times"),
    ],
)
def test_bad_lines_and_images_are_one_message_with_their_place(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    (tmp_path / "1.png").write_bytes(png())
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(png()[:300])
    (tmp_path / "large.png").write_bytes(hollow_png(8000))
    (tmp_path / "huge.png").write_bytes(hollow_png(60000))
    (tmp_path / "long.png").write_bytes(png(1, 900))
    good = {"problem": "x", "answer": "1", "image": "1.png"}
    with pytest.raises(UserError) as caught:
        geo3k(tmp_path, [good, row])
    assert "data.jsonl:2: " in caught.value.problem and said in caught.value.problem and caught.value.fix


def test_what_is_transparent_is_white_and_pictures_are_upright() -> None:
    picture = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    picture.putpixel((3, 2), (0, 0, 0, 255))
    file = io.BytesIO()
    picture.save(file, "PNG")
    seen = np.asarray(open_rgb(file.getvalue()))
    assert seen.shape == (8, 16, 3) and seen.min(-1).sum() == 255 * (8 * 16 - 1) and not seen[2, 3].any()
    assert open_rgb(png(mode="L")).mode == open_rgb(png(mode="P")).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    turned = io.BytesIO()
    Image.new("RGB", (16, 8)).save(turned, "JPEG", exif=exif)
    assert open_rgb(turned.getvalue()).size == (8, 16)
