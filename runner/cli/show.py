"""What is shown instead of done: `--cfg`, `--info`, and what Tab completes. Hydra answers, the verbs are ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from runner.cli.verb import Command, Parser
from runner.errors import UserError

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def config_flags(parser: Parser) -> None:
    """The flags of a verb that composes a config."""
    parser.flag("--cfg", "-c", metavar="job", choices=("job", "hydra", "all"), help="job: print the composed config and stop")
    parser.flag("--resolve", action="store_true", help="with --cfg: interpolations resolved")
    parser.flag("--package", "-p", metavar="KEY", help="with --cfg: this part of it only, such as precision")
    parser.flag("--info", "-i", metavar="PART", choices=INFO, help=f"how Hydra composed it: {', '.join(INFO)}")


def with_info(argv: list[str]) -> list[str]:
    """`--info` alone means all of it; what follows may be an override."""
    following = [*argv, ""][1:]
    return [
        f"{item}=all" if item in ("--info", "-i") and after not in INFO else item
        for item, after in zip(argv, following, strict=True)
    ]


def shown(command: Command) -> bool:
    """Whether a flag asked to see the config, which is then printed. UserError: `--package` or `--resolve` without `--cfg`."""
    flags = vars(command.flags)
    alone = next((name for name in ("package", "resolve") if flags.get(name) and not (flags["cfg"] or flags["info"])), None)
    if alone:
        value = flags["package"] if alone == "package" else ""
        raise UserError(f"--{alone} says how --cfg prints", fix=f"--cfg job --{alone} {value}".rstrip())
    resolve = ["--resolve"] if flags.get("resolve") else []
    if flags.get("info"):
        _hydra_app(["--info", flags["info"], *command.overrides])
    elif flags.get("cfg") in ("hydra", "all"):
        _hydra_app(["--cfg", flags["cfg"], *resolve, *command.overrides])
    elif flags.get("cfg"):
        from runner.config import compose

        loaded = compose.load(command.overrides, check_rules=False)
        sys.stdout.write(compose.to_yaml(loaded.raw, resolve=bool(resolve), package=flags["package"]))
    else:
        return False
    return True


def asks_for_completion(argv: list[str]) -> bool:
    return bool(argv) and argv[0].partition("=")[0] in ("--shell-completion", "-sc")


def complete(argv: list[str], verbs: Iterable[str]) -> None:
    """`eval "$(runner -sc install=bash)"`, and the queries of Tab. Verbs are ours, keys and options Hydra's."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) > 1 and words[1] in verbs and (len(words) > 2 or line.endswith(" ")):
        os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    elif line and "query=bash" in argv and len(words) <= 2:
        start = words[1] if len(words) == 2 else ""
        for verb in verbs:
            if verb.startswith(start):
                print(verb)
    _hydra_app(argv)


def _hydra_app(argv: list[str]) -> None:
    """Hand --info, --cfg hydra and shell completion to Hydra itself; it never gets as far as running a job."""
    import hydra

    from runner.config import compose, searchpath

    compose.register()

    @hydra.main(config_path=str(searchpath.CONFIG_DIR), config_name=compose.CONFIG_NAME, version_base=compose.VERSION_BASE)
    def application(cfg: Any) -> None:
        raise AssertionError("Hydra was asked to show something, not to run")

    sys.argv = [sys.argv[0], *argv]
    application()
