"""Rows of data files: JSONL, Parquet, Arrow, folders of shards, hub data sets. Every row comes with its place, "file:row".

Parquet and Arrow are read by pyarrow (pip install 'runner[data]'), a few rows at a time; nothing of a file is run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from runner.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Row = tuple[str, dict[str, Any]]  # "file:row", counted from 1, and its fields

MAX_ROW_BYTES = 64 << 20  # an image of the largest size that is taken, as base64, and its text
ROWS_AT_ONCE = 64
OTHER_KINDS = {  # by their first bytes
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"PK\x03\x04": "a zip archive",
}
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
SUFFIXES = (".parquet", ".arrow")
SAVED_DICT, SAVED_STATE = "dataset_dict.json", "state.json"  # of `save_to_disk`: of several splits, of one
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
INSTALL = "pip install 'runner[data]'"


@dataclass(frozen=True)
class Split:
    """Which part of a folder or of a hub data set is meant."""

    file: str  # the JSONL file of a folder
    hub: str  # the split of a hub data set
    names: tuple[str, ...]  # what shards and folders may be called; the first that is there is read
    hub_config: str | None = None


def rows(source: str, key: str, split: Split) -> Iterator[Row]:
    """Every row of a file, a folder or a hub data set. UserError naming what is missing, or file and row of what is broken."""
    path = Path(source).expanduser()
    if path.is_dir():
        for file in _files_of(path, key, split):
            yield from read_file(file, key)
    elif path.exists() or path.suffix in {".jsonl", ".json", *SUFFIXES} or source.startswith((".", "/", "~")):
        yield from read_file(path, key)
    else:
        yield from _hub_rows(source, key, split)


def needs_arrow(source: str) -> bool:
    """Whether this is here, and pyarrow reads it."""
    path = Path(source).expanduser()
    if path.is_dir():
        return not any(path.glob("*.jsonl")) and any(True for suffix in SUFFIXES for _ in path.rglob(f"*{suffix}"))
    return path.is_file() and _is_table(path)


def read_file(path: Path, key: str) -> Iterator[Row]:
    yield from (_read_table if _is_table(path) else read_jsonl)(path, key)


# ---- folders


def _files_of(folder: Path, key: str, split: Split) -> list[Path]:
    """The files of a folder that hold the split, in the order of their rows."""
    if (folder / split.file).exists():
        return [folder / split.file]
    if (folder / SAVED_DICT).exists():
        names = _json(folder / SAVED_DICT, key).get("splits", [])
        chosen = _chosen(folder, key, split, {name: [folder / name] for name in names if isinstance(name, str)})
        return _saved_shards(chosen[0], key)
    if (folder / SAVED_STATE).exists():
        return _saved_shards(folder, key)
    if split.hub_config and (folder / split.hub_config).is_dir():
        folder = folder / split.hub_config
    shards: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        parts = file.relative_to(folder).parts
        if not any(part.startswith((".", "_")) for part in parts):
            found = next((match for part in reversed(parts) if (match := _SPLIT.match(part))), None)
            shards.setdefault(found[1].lower() if found else "", []).append(file)
    if not shards:
        raise UserError(
            f"'{folder}' holds no {split.file}, no Parquet files and no saved data set",
            key=key,
            fix="give the path of a file, or of a folder with one of these",
        )
    files = shards[""] if list(shards) == [""] else _chosen(folder, key, split, shards)
    if len(folders := sorted({str(file.parent.relative_to(folder)) for file in files})) > 1:
        raise UserError(f"the shards of '{folder}' lie in {', '.join(folders)}", key=key, fix=f"{key}={folder / folders[0]}")
    return files


def _chosen(folder: Path, key: str, split: Split, there: dict[str, list[Path]]) -> list[Path]:
    for name in split.names:
        if name in there:
            return there[name]
    named = ", ".join(name or "files of no split" for name in there)
    problem = f"'{folder}' holds {named or 'no splits'}; wanted is {' or '.join(split.names)}"
    raise UserError(problem, key=key, fix="give the path of the file itself")


def _saved_shards(folder: Path, key: str) -> list[Path]:
    """The Arrow files of a data set that `datasets` saved, in order."""
    state = _json(folder / SAVED_STATE, key)
    if state.get("_indices_data_files"):
        problem = f"'{folder}' keeps its rows under an index (a selection or another order)"
        raise UserError(problem, key=key, fix="save the data set after flatten_indices()")
    try:
        return [folder / str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"'{folder / SAVED_STATE}' names no data files", key=key, fix="save the data set again") from error


def _json(path: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read '{path}': {error}", key=key, fix="save the data set again") from error
    if not isinstance(found, dict):
        raise UserError(f"'{path}' is no JSON object", key=key, fix="save the data set again")
    return found


# ---- Parquet and Arrow


def _is_table(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe is read once
            return path.suffix in SUFFIXES
        with path.open("rb") as file:
            first = file.read(8)
    except OSError:
        return path.suffix in SUFFIXES
    return first.startswith((PARQUET, ARROW_FILE)) or (first.startswith(ARROW_STREAM) and path.suffix == ".arrow")


def _read_table(path: Path, key: str) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"'{path}' is read by pyarrow, which is not installed", key=key, fix=INSTALL)
    count = 0
    try:
        for batch in _batches(path):
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                piece = batch.slice(start, ROWS_AT_ONCE)
                for row in _plain(piece, path, count, key):
                    count += 1
                    yield f"{path}:{count}", row
    except UserError:
        raise
    except OSError as error:
        problem = f"cannot read '{path}': {error.strerror or _first_line(error)}"
        raise UserError(problem, key=key, fix="give the path of a whole Parquet or Arrow file") from error
    except Exception as error:  # of the decoder, for a damaged file
        problem = f"'{path}' is damaged after row {count}: {_first_line(error)}"
        raise UserError(problem, key=key, fix="write or download it again") from error


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        first = file.read(8)
    if first.startswith(PARQUET):
        with pq.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False)
        return
    with pa.memory_map(str(path)) as mapped:
        if first.startswith(ARROW_FILE):
            reader = pa.ipc.open_file(mapped)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(mapped)


def _plain(batch: pa.RecordBatch, path: Path, before: int, key: str) -> Iterator[dict[str, Any]]:
    """The rows of a batch as Python values; a row that is too large or no text is named."""
    if batch.nbytes <= MAX_ROW_BYTES:
        try:
            yield from batch.to_pylist()
            return
        except ValueError:  # bytes that are no UTF-8, or a date beyond Python's: the row is found below
            pass
    for index in range(batch.num_rows):
        one, place = batch.slice(index, 1), f"{path}:{before + index + 1}"
        if one.nbytes > MAX_ROW_BYTES:
            problem = f"{place}: more than {MAX_ROW_BYTES >> 20} MiB in one row"
            raise UserError(problem, key=key, fix="leave out the columns that no task reads, or the row")
        try:
            (row,) = one.to_pylist()
        except ValueError as error:
            raise UserError(f"{place}: {_first_line(error)}", key=key, fix="mend or remove this row") from error
        yield row


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


# ---- JSONL


def read_jsonl(path: Path, key: str) -> Iterator[Row]:
    """("file:line", object) of every line that is not blank; UserError naming file and line."""
    try:
        with path.open("rb") as file:
            _check_kind(path, file, key)
            for number, line in enumerate(iter(partial(file.readline, MAX_ROW_BYTES + 1), b""), 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                if len(line) > MAX_ROW_BYTES:
                    raise UserError(
                        f"{place}: more than {MAX_ROW_BYTES >> 20} MiB in one line", key=key, fix="one JSON object per line"
                    )
                try:
                    row = json.loads(line)
                except RecursionError as error:
                    raise UserError(f"{place}: nested too deeply", key=key, fix="mend or remove this line") from error
                except ValueError as error:  # broken JSON or broken UTF-8
                    raise UserError(f"{place}: not JSON ({error})", key=key, fix=_mend(line)) from error
                if not isinstance(row, dict):
                    raise UserError(
                        f"{place}: a {type(row).__name__}, not a JSON object", key=key, fix="mend or remove this line"
                    )
                yield place, row
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}", key=key, fix="give the path of a JSONL file") from error


def _check_kind(path: Path, file: IO[bytes], key: str) -> None:
    """UserError for a file that says that it is something else; the file is at its beginning afterwards."""
    if not file.seekable():
        return
    first = file.read(8)
    file.seek(0)
    for start, name in OTHER_KINDS.items():
        if first.startswith(start):
            problem = f"'{path}' is {name}; data is read from JSONL, Parquet and Arrow files"
            raise UserError(problem, key=key, fix="unpack it")


def _mend(line: bytes) -> str:
    return "one JSON object per line, without an array around them" if line.lstrip()[:1] == b"[" else "mend or remove this line"


# ---- the hub


def _hub_rows(source: str, key: str, split: Split) -> Iterator[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"'{source}' is not a file here, and reading it from the hub needs the `datasets` package",
            key=key,
            fix="give the path of a file or folder, or pip install datasets",
        )
    load: Callable[..., Any] = importlib.import_module("datasets").load_dataset
    try:
        found = load(source, split.hub_config, split=split.hub)
    except Exception as error:  # the package raises many kinds: network, unknown id, unknown split
        problem = f"cannot load '{source}' from the hub: {_first_line(error)}"
        raise UserError(problem, key=key, fix="give the path of a file or folder") from error
    for place, row in enumerate(found):
        yield f"{source}[{split.hub}]:{place}", row
