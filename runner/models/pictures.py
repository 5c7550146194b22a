"""Reading image files that come with problems: data from elsewhere, checked for size and format before pixels exist."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow's own decoders; no format that starts another program
MAX_FILE_BYTES = 32 << 20
MAX_PIXELS = 1 << 25  # 32 million, 96 MiB as RGB: what a compressed file may unfold into


def image_bytes(row: dict[str, Any], folder: Path) -> list[bytes]:
    """The encoded images of a problem: `image`, a path relative to `folder`, or `image_base64`; or several in `images`. In
    place of a path there may be the file's bytes, or {"bytes": ..., "path": ...} as `datasets` keeps images.

    ValueError saying what is missing or cannot be read.
    """
    given = [row[key] for key in ("image", "image_base64") if row.get(key) is not None]
    if row.get("images") is not None:
        if not isinstance(row["images"], list):
            raise ValueError("`images` must be a list")
        given += row["images"]
    if not given:
        raise ValueError("0 images; a problem has one or more")
    given = [(entry.get("bytes") or entry.get("path")) if isinstance(entry, dict) else entry for entry in given]
    if not all(isinstance(entry, str | bytes) for entry in given):
        raise ValueError("an image is the path of a file, its bytes, or its bytes as text in `image_base64`")
    if row.get("image_base64") is not None:
        if len(given) > 1:
            raise ValueError(f"{len(given)} images; several are paths in `images`, without `image_base64`")
        return [_decoded(str(given[0]))]
    return [_small(entry) if isinstance(entry, bytes) else _read(folder, entry) for entry in given]


def _small(data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"an image has {len(data)} bytes, more than {MAX_FILE_BYTES}")
    return data


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"image '{name}' has {path.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read image '{name}' beside the file: {error.strerror}") from None


def _decoded(text: str) -> bytes:
    if len(text) > MAX_FILE_BYTES * 4 // 3:
        raise ValueError(f"`image_base64` has {len(text)} characters, more than {MAX_FILE_BYTES} bytes hold")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("`image_base64` is not base64") from None


def open_rgb(data: bytes) -> Image.Image:
    """The image upright in RGB, what is transparent on white. ValueError when it is too large or cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size  # from the header: nothing is decoded yet
                if width * height > MAX_PIXELS:
                    raise ValueError(f"the image would have {width} x {height} pixels, more than {MAX_PIXELS}")
                opened.load()
                upright = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise ValueError(f"the image is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    except (OSError, SyntaxError, EOFError) as error:  # cut off or damaged, in the words of the decoder
        raise ValueError(f"the image is damaged: {error}") from None
    if upright.has_transparency_data:
        ground = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")


def resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], bicubic as in Qwen's processor."""
    import numpy as np  # here, because choosing a task imports no more than it must

    if image.size == (width, height):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
