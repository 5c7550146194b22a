"""`python -m runner doctor`: this machine; `doctor engine`: what engines really compute with; `doctor gpu`: what a GPU shows."""

from __future__ import annotations

from runner.cli.show import config_flags
from runner.cli.verb import Command, Verb


def start(command: Command) -> int:
    from runner.config import compose

    config = compose.load(command.overrides).config
    from runner.doctor.table import make_console, show

    if command.words == ["engine"]:
        from runner.doctor.engine import check_engine

        return check_engine(config, make_console())
    if command.words == ["gpu"]:
        from runner.doctor.gpu import check_gpu

        return check_gpu(config, make_console())
    if command.words == ["cluster"]:
        from runner.doctor.cluster import check_cluster

        return show("The cluster", check_cluster(config), make_console())
    from runner.doctor.machine import check_machine

    return show("This machine", check_machine(config), make_console())


VERB = Verb(
    name="doctor",
    summary="check this machine; doctor engine, gpu, cluster: what engines compute with, a GPU measured, the nodes",
    usage="[machine|engine|gpu|cluster] [key=value ...]",
    about="""doctor          what this machine has and lacks
doctor engine   recover the weights that an engine really computes with, through its own kernels, and compare them with the plan
doctor gpu      measure this machine's GPU: kernels, the trainer, real SGLang servers; writes a report into outputs_dir
doctor cluster  what every node of cluster=ray has, what differs between them, and how fast they talk
Exit code 0: nothing failed; 1: something did; 2: a mistake to mend.""",
    examples=(
        ("doctor", "cores, memory, disk, GPUs, packages"),
        ("doctor engine", "the engine of the default run"),
        ("doctor gpu", "one GPU, with everything that `make setup-gpu` installs"),
        ("doctor cluster recipe=qwen3_235b_int4 cluster.address=10.0.0.1:6379", "its eight nodes, before the run"),
    ),
    start=start,
    words=("machine", "engine", "gpu", "cluster"),
    groups=True,
    flags=config_flags,
)
