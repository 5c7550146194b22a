"""`python -m runner doctor`: this machine; `doctor engine`: what engines really compute with; `doctor gpu`: what a GPU shows."""

from __future__ import annotations

from runner.cli.show import config_flags
from runner.cli.verb import Command, Verb


def start(command: Command) -> int:
    from runner.config import compose

    config = compose.load(command.overrides).config
    from runner.doctor.findings import make_console, show

    if command.words == ["engine"]:
        from runner.doctor.engine import check_engine

        return check_engine(config, make_console())
    if command.words == ["gpu"]:
        from runner.doctor.gpu import check_gpu

        return check_gpu(config, make_console())
    from runner.doctor.machine import check_machine

    return show("This machine", check_machine(config), make_console())


VERB = Verb(
    name="doctor",
    summary="check this machine; doctor engine checks what the engines really compute with",
    usage="[machine|engine|gpu] [key=value ...]",
    about="""doctor          what this machine has and lacks
doctor engine   recover the weights that an engine really computes with, through its own kernels, and compare them with the plan
doctor gpu      measure this machine's GPU: kernels, the trainer, real SGLang servers; writes a report into outputs_dir
Exit code 0: nothing failed; 1: something did; 2: a mistake to mend.""",
    examples=(
        ("doctor", "cores, memory, disk, GPUs, packages"),
        ("doctor engine", "the engine of the default run"),
        ("doctor gpu", "one GPU, with everything that `make setup-gpu` installs"),
    ),
    start=start,
    words=("machine", "engine", "gpu"),
    groups=True,
    flags=config_flags,
)
