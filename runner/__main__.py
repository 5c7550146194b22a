"""`python -m runner [verb] key=value ...` and the installed `runner` script: exit codes around runner/cli/.

Nothing that this module imports imports torch or ray: `--cfg job`, `--help` and every press of Tab start it.
"""

from __future__ import annotations

import os
import sys

from runner.errors import Failure, UserError, UserErrors


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 a mistake of the user (no traceback), 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        from runner.cli.main import dispatch
        from runner.cores import respect_quota

        respect_quota()
        return dispatch(argv)
    except UserErrors as errors:
        count = len(errors.errors)
        print(f"{count} problem{'s' if count > 1 else ''}; nothing was started.\n{errors}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `runner --cfg job | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
