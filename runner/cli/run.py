"""`python -m runner`: the whole loop. The verb that is meant where none is named."""

from __future__ import annotations

from runner import sweep
from runner.cli.show import config_flags
from runner.cli.verb import Command, Parser, Verb
from runner.errors import Failure


def start(command: Command) -> int:
    swept = sweep.sweep_overrides(command.overrides, multirun=command.flags.multirun)
    if swept is not None:
        return sweep.run(swept)
    from runner import redaction
    from runner.config import compose, preflight

    loaded = compose.load(command.overrides)
    preflight.check(loaded.config)  # before torch is imported: a machine that cannot run it hears so at once
    from runner.run.supervise import main

    try:
        return main(loaded.config, redaction.recorded(loaded.overrides))
    except BrokenPipeError:  # not the end that `--cfg job | head` is: steps are missing
        problem = "the run ended because nobody reads what it prints any more (a pipe to head?)"
        raise Failure(problem, fix="write to a file, and resume=<its folder> from its last checkpoint") from None


def flags(parser: Parser) -> None:
    config_flags(parser)
    parser.flag("-m", "--multirun", action="store_true", help="runs a sweep over every key=a,b,c, as the verb sweep does")


VERB = Verb(
    name="run",
    summary="the whole loop (the default verb)",
    usage="[key=value ...]",
    about="""Generate, reward, advantage, update, sync: one run, described by the config. The word `run` may be left out.
Everything is checked before anything starts. Ctrl-C saves a checkpoint and says how to go on; a second one leaves at once.
Exit code 0: completed; 1: failed, or stopped by a watch rule; 2: a mistake to mend; 130: Ctrl-C.""",
    examples=(
        ("", "the default run on this machine's CPU, a few minutes"),
        ("precision=int4_qat model=qwen3_30b", "a complete 8 x H200 run"),
        ("model=qwen3_4b precision=fp8", "one GPU, which the torch trainer and SGLang take turns on; no Megatron"),
        ("recipe=qwen3_235b_int4 scale=laptop", "a recipe at toy size, on a CPU"),
        ("steps=5 --cfg job", "the composed config, nothing is run"),
        ("-m precision.group_size=32,64,128", "a sweep, one fresh process per job, with a summary table"),
    ),
    start=start,
    groups=True,
    flags=flags,
)
