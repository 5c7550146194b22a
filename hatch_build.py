"""Writes the commit that a wheel or sdist is built from into it, where `runner --version` finds it."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):
    """An editable install asks git each time; outside a repository nothing is written, and the version says `unknown`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if version == "editable" or (root / "runner" / "commit.json").is_file():  # an sdist brings it along
            return
        spec = importlib.util.spec_from_file_location("provenance", root / "runner" / "provenance.py")
        assert spec is not None and spec.loader is not None
        provenance = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(provenance)
        found = provenance.git_state(root)
        if found is not None:
            self.folder = tempfile.TemporaryDirectory()
            record = Path(self.folder.name) / "commit.json"
            record.write_text(json.dumps(found) + "\n")
            build_data["force_include"][str(record)] = "runner/commit.json"
