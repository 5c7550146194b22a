"""Where `method=gptq` ends for now: GPTQ through llmcompressor is not built.

llmcompressor 0.14.0.1 asks for transformers up to 5.17 and compressed-tensors 0.19.0, against 5.19.0 and 0.18.0 here, so it
needs an environment of its own; until that is built and tested, asking for it is an error and not round-to-nearest.
"""

from __future__ import annotations

from pathlib import Path

from runner.errors import UserError
from runner.schema import Config


def main(cfg: Config, source: Path, target: Path) -> int:
    """Raises UserError, always: nothing is converted by another method than the one asked for."""
    raise UserError(
        f"method=gptq is not built in this version, nothing was written to {target}",
        key="convert.method",
        fix="convert.method=rtn",
    )
