"""GPTQ through llmcompressor, an optional extra with its own pins."""

from __future__ import annotations

from pathlib import Path

from runner.errors import UserError
from runner.schema import Config


def main(cfg: Config, source: Path, target: Path) -> int:
    raise UserError("method=gptq is not available in this version", key="convert.method", fix="convert.method=rtn")
