"""Docstrings on the site's API page: they are plain text, which Markdown would join and take `<name>` of for a tag."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

COLUMNS = re.compile(r"\S {2,}\S")


class PlainText(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Paragraphs with columns or indented lines become code blocks, as they stand; in others `<` is escaped outside backticks."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.splitlines()
        if any(COLUMNS.search(line) or line.startswith("    ") for line in lines):
            parts.append("\n".join(f"    {line}" for line in lines))
        else:
            pieces = re.split(r"(`[^`]*`)", paragraph)
            parts.append("".join(piece if piece.startswith("`") else piece.replace("<", "&lt;") for piece in pieces))
    return "\n\n".join(parts)
