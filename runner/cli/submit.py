"""`python -m runner submit`: a job for a scheduler that starts Ray and the run on it."""

from __future__ import annotations

from runner.cli.show import config_flags
from runner.cli.verb import Command, Parser, Verb


def start(command: Command) -> int:
    import shutil
    import subprocess
    from pathlib import Path

    import runner
    from runner.cluster import jobs
    from runner.config import compose
    from runner.config.overrides import override_key
    from runner.errors import UserError

    config = compose.load(command.overrides).config
    kept = [item for item in command.overrides if override_key(item) != "cluster"]
    job = jobs.render(config, kept, command.own, Path(runner.__file__).parents[1])
    if command.flags.dry_run:
        print(job.text, end="")
        return 0
    if shutil.which(job.program[0]) is None:
        raise UserError(f"{job.program[0]} is not installed here", key="cluster", fix="--dry-run prints the job")
    return subprocess.run(job.program, input=job.text, text=True, check=False).returncode


def own() -> dict[str, str]:
    from runner.cluster.jobs import OWN

    return OWN


def flags(parser: Parser) -> None:
    config_flags(parser)
    parser.flag("--dry-run", action="store_true", help="prints the job and submits nothing")


VERB = Verb(
    name="submit",
    summary="hand a run to Slurm or Kubernetes as a job that starts Ray",
    usage="cluster=slurm|k8s [key=value ...] [--dry-run]",
    about="""Writes an sbatch script or a KubeRay RayJob around `cluster=ray` and gives it to sbatch or kubectl.
Exit code 0: submitted, or printed; 2: a mistake to mend; others are those of sbatch and kubectl.""",
    examples=(
        ("submit recipe=qwen3_235b_int4 cluster=slurm --dry-run", "the script for 8 nodes"),
        ("submit recipe=kimi_k2_int4 cluster=k8s image=registry.example/runner:0.1.0", "a RayJob of 32 nodes"),
    ),
    start=start,
    own=own,
    groups=True,
    flags=flags,
)
