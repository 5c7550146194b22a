"""`python -m runner plan`: what goes on which GPU, what fits, what moves."""

from __future__ import annotations

from pathlib import Path

from runner.cli.show import config_flags
from runner.cli.verb import Command, Verb
from runner.config.schema import ModelConfig


def start(command: Command) -> int:
    from runner.config import compose

    loaded = compose.load(command.overrides)
    check_weights(loaded.config.model)
    from runner.planner.tables import show

    return show(loaded.config)


def check_weights(model: ModelConfig) -> None:
    """Where the weights of the checkpoint lie beside its config.json: UserError unless their headers are what it says. A folder
    with config.json alone is planned."""
    folder = Path(model.hf_checkpoint or "").expanduser()
    if model.hf_checkpoint is None or not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return
    from runner.convert.reading import open_checkpoint

    open_checkpoint(model)


VERB = Verb(
    name="plan",
    summary="what goes on which GPU, what fits, what moves; needs no GPU",
    usage="[key=value ...]",
    about="""Parameters by role and format, ranks and engines by GPU, memory at its peak, and bytes that move per step.
`model=auto model.hf_checkpoint=DIR`: a checkpoint of yours; config.json alone will do, weights beside it must be what it says.
Exit code 0: it fits; 1: it does not, and the changes that would make it fit are listed; 2: a mistake to mend.""",
    examples=(
        ("plan recipe=kimi_k2_int4", "what goes on which GPU, what fits, what moves; no GPU needed"),
        ("plan model=qwen3_30b precision=bf16", "whether it fits without quantization"),
        ("plan model=qwen3_30b trainer.max_tokens_per_gpu=32768", "a change, before it is tried"),
    ),
    start=start,
    groups=True,
    flags=config_flags,
)
