"""`python -m runner convert source=DIR target=DIR precision=...`: a checkpoint from one format into another."""

from __future__ import annotations

import re
from dataclasses import fields

from runner.cli.show import config_flags
from runner.cli.verb import Command, Verb


def own_keys() -> dict[str, str]:
    """The keys of the schema's `convert` group; their defaults and comments are those of conf/config.yaml."""
    from runner.config.compose import CONFIG_NAME
    from runner.config.schema import ConvertConfig
    from runner.config.searchpath import CONFIG_DIR

    block = (CONFIG_DIR / f"{CONFIG_NAME}.yaml").read_text().partition("\nconvert:")[2].partition("\n\n")[0]
    said = {key: (value, comment) for key, value, comment in re.findall(r"^  (\w+): (\S+)(?: +# (.*))?$", block, re.MULTILINE)}
    texts = {}
    for field in fields(ConvertConfig):
        value, comment = said.get(field.name, ("", ""))
        texts[field.name] = "; ".join(part for part in (comment, f"default {value}" if value not in ("", "null") else "") if part)
    return texts


def start(command: Command) -> int:
    from runner.config import compose

    config = compose.load(command.overrides, check_rules=False).config
    from runner.convert.command import run

    return run(config, command.overrides)


VERB = Verb(
    name="convert",
    summary="a checkpoint into INT4, FP8 or FP4, or back",
    usage="source=DIR target=DIR [precision=...] [key=value ...]",
    about="""Writes a HuggingFace folder in the format that `precision` has for rollout (or in `format`), shard by shard.
Which weights are quantized, and in which groups, is said by precision.roles and precision.group_size; family and sizes come
from the source. The same command again goes on where it was stopped.
Exit code 0: converted; 2: a mistake to mend; 130: Ctrl-C.""",
    examples=(
        ("convert source=DIR target=DIR precision=int4_qat", "to INT4, as an int4_qat run's engine reads it"),
        ("convert source=DIR target=DIR precision=bf16", "back to bf16"),
        ("convert source=DIR target=DIR format=fp8_channel", "a format without a precision of its own"),
        ("convert source=DIR target=DIR method=gptq calibration=train.jsonl", "GPTQ (after `make setup-gptq`)"),
    ),
    start=start,
    own=own_keys,
    group="convert",
    flags=config_flags,
)
