"""`make lock`: pins of everything that runner needs, directly or not, as they are in this environment.

    python .ci/lock.py > constraints.txt

Only names and versions are written, no address of an index; a local version (2.13.0+cpu) loses its label, so that the same
file serves every build of torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "runner[dev,megatron]"


def main() -> int:
    versions: dict[str, str] = {}
    wanted = [Requirement(ROOT)]
    seen: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            sys.exit(f"{requirement} is not installed here: make setup")
        versions[canonicalize_name(requirement.name)] = found.version.partition("+")[0]
        for text in found.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")):
                wanted.append(needed)
    del versions["runner"]
    print("# Made by `make lock` from an environment in which the tests passed; `make setup` installs these versions.")
    for name, version in sorted(versions.items()):
        print(f"{name}=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
