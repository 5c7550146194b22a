"""Images of the samples that are kept for people: files under rollouts/step_N/, and what pages and terminals make of them."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import Failure
from runner.storage import new_folder

if TYPE_CHECKING:
    import numpy as np
    from rich.text import Text

LARGEST_SIDE = 256  # pixels that people see; larger images are reduced
EXACT_PIXELS = 128 * 128  # up to here as PNG, bit for bit; larger ones as JPEG
TERMINAL_COLUMNS = 48
MIME = {"png": "image/png", "jpg": "image/jpeg"}
_NAME = re.compile(r"\d{1,6}\.(png|jpg)")


def name(number: int, pixels: np.ndarray) -> str:
    """Of the file that holds the number-th image of a step."""
    return f"{number}.{'png' if pixels.shape[0] * pixels.shape[1] <= EXACT_PIXELS else 'jpg'}"


def write(rollouts: Path, step: int, pictures: Mapping[str, np.ndarray]) -> None:
    """Write uint8 [H, W, 3] images by name into `rollouts`/step_N. Failure where they cannot be written."""
    from PIL import Image

    folder = folder_of(rollouts, step)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as partial:
            for file, pixels in pictures.items():
                image = Image.fromarray(pixels)
                image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
                image.save(partial / file)
    except OSError as error:
        raise Failure(f"cannot write {folder}: {error.strerror or error}", fix="free some space") from error


def folder_of(rollouts: Path, step: int) -> Path:
    return rollouts / f"step_{step}"


def of_row(rollouts: Path, step: int, row: dict[str, Any]) -> list[Path]:
    """The files of a kept sample's images, in their order; one that is not there, or is no image of ours, is left out."""
    named = [str(entry.get("file", "")) for entry in row.get("images") or [] if isinstance(entry, dict)]
    files = (folder_of(rollouts, step) / file for file in named if _NAME.fullmatch(file))
    return [file for file in files if file.is_file()]


def data_uri(file: Path) -> str:
    """The image as a page holds it in itself."""
    return f"data:{MIME[file.suffix[1:]]};base64,{base64.b64encode(file.read_bytes()).decode()}"


def by_turn(row: dict[str, Any], shown: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """(those of the prompt, those of each turn) of a row's images `shown`, which come in the order of the conversation."""
    turns = row.get("turns") or []
    counts = [0 if turn.get("left_out") else int(turn.get("images") or 0) for turn in turns]
    rest = iter(shown[max(0, len(shown) - sum(counts)) :])
    return shown[: max(0, len(shown) - sum(counts))], [
        [image for _, image in zip(range(count), rest, strict=False)] for count in counts
    ]


def drawn(file: Path) -> Text:
    """The image in a terminal's colours, two pixels a character; a line that says so where it cannot be read."""
    import numpy as np
    from PIL import Image
    from rich.text import Text

    text = Text()
    try:
        with Image.open(io.BytesIO(file.read_bytes()), formats=("PNG", "JPEG")) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError) as error:
        return text.append(f"{'':>12}  [{file.name} cannot be read: {error}]\n", "red")
    image.thumbnail((TERMINAL_COLUMNS, TERMINAL_COLUMNS))
    if image.height % 2:
        image = image.crop((0, 0, image.width, image.height + 1))
    pixels = np.asarray(image)
    for row in range(0, image.height, 2):
        text.append(f"{'':>14}")
        for column in range(image.width):
            upper, lower = (f"#{bytes(pixels[row + half, column]).hex()}" for half in (0, 1))
            text.append("▀", f"{upper} on {lower}")
        text.append("\n")
    return text
