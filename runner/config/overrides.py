"""Overrides as text: read as the schema means them, written so that they read back, quoted for the shell. Torch-free.

    readable(["run_name=12e4567"])      ["run_name='12e4567'"]: the key is a text, so what was typed is
    override("run_name", "a, b")        run_name='a, b'
    command("run_name='a, b'")          python -m runner "run_name='a, b'"

Hydra decides by a value's look whether it is a number, a flag or a text, and its grammar is ASCII; the schema knows better.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from runner import PROGRAM
from runner.config import limits
from runner.config import option as options

_SAFE_FOR_SHELL = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_CHOICE = re.compile(r"choice\s*\((.*)\)", re.DOTALL)


def override_key(text: str) -> str:
    """`+model.x=1` -> `model.x`."""
    return text.partition("=")[0].lstrip("+~").strip()


def parse(text: str) -> Override | None:
    """Hydra's reading of one override, or None where its grammar cannot read it (huge integers included)."""
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError):
        return None


def override(key: str, value: str) -> str:
    """`key=value` that Hydra reads as exactly this text: quoted and escaped where it has to be."""
    plain = f"{key}={value}"
    return plain if _reads_back(parse(plain), value) else f"{key}={quoted(value)}"


def typed(key: str, value: str) -> str:
    """The same as short as a user may type it: `readable` takes more without quotes than Hydra."""
    plain = f"{key}={value}"
    return plain if _reads_back(parse(readable([plain])[0]), value) else f"{key}={quoted(value)}"


def _reads_back(parsed: Override | None, value: str) -> bool:
    if parsed is None or parsed.is_sweep_override() or "${" in value or value.startswith("~"):
        return False
    return isinstance(parsed.value(), str) and parsed.value() == value


def quoted(value: str) -> str:
    """`value` as one Hydra string, interpolations escaped."""
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return QuotedString(text, Quote.single).with_quotes()


def shell(word: str) -> str:
    """One word of a command line as a user types it, readable where it can be: 'a="b c"', "a='b c'"."""
    if _SAFE_FOR_SHELL.fullmatch(word):
        return word
    if "'" in word and not set('"$`\\!') & set(word):
        return f'"{word}"'
    return shlex.quote(word)


def command(*words: str) -> str:
    """A line to type: the program and these words, quoted for the shell."""
    return " ".join([PROGRAM, *map(shell, words)])


def expand_home(path: str) -> str:
    """`~` and `~user` at the start of a path; a home that cannot be found stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path would rewrite a hub id, and raises for an unknown ~user)


# Words of TeX that begin like a newline: \neq is no line break in front of "eq".
_TEX_WORDS = (
    "nabla|natural|ncong|ne|nearrow|neg|neq|newcommand|newline|nexists|ng|ngeq|ngtr|ni|nleftarrow|nleq|nless|nmid|nobreak|noindent|"
    "nolimits|nolinebreak|nonumber|nopagebreak|normalfont|normalsize|not|notag|notin|nparallel|nprec|nrightarrow|nsim|nsubseteq|"
    "nsucc|nsupseteq|nu|null|nwarrow"
)
_NEWLINE = re.compile(rf"(?<!\\)\\(?!(?:{_TEX_WORDS})(?![A-Za-z]))n")


def with_newlines(text: str) -> str:
    r"""`\n` as it comes from a shell or a plain YAML value is a line break, except in `\\n` and in TeX such as `\neq`."""
    return _NEWLINE.sub("\n", text)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; bytes of a command line that are none arrive as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def joined_surrogates(text: str) -> str:
    """A file written as ASCII holds a character beyond U+FFFF as two halves, which YAML reads as two characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text


def given(overrides: list[str], key: str) -> str | None:
    """The text that the last override of a text key sets, None where it is not given or null."""
    values = [item for item in readable(overrides) if override_key(item) == key and "=" in item]
    parsed = parse(values[-1]) if values else None
    if parsed is None or parsed.is_sweep_override():
        return None
    value = OmegaConf.create({"value": parsed.value()}).value  # interpolations resolved
    return None if value is None else str(value)


def readable(overrides: list[str]) -> list[str]:
    """The same overrides, values of text keys quoted wherever Hydra would take them for something else.

    `12e4567`, `1_1_1` and `true` stay what was typed; beyond ASCII and other characters that its grammar has no place for need
    no quotes, as long as no comma, quote or bracket leaves open what was meant.
    """
    kinds = options.typed_keys()
    return [_readable(item, kinds.get(override_key(item))) for item in overrides]


def _readable(item: str, kind: Any) -> str:
    name, equals, text = item.partition("=")
    if not equals or not (limits.is_text(kind) or limits.is_text_list(kind)):
        return item
    text = text.strip()
    parsed = parse(item)
    if parsed is None:
        plain = limits.is_text(kind) and not set("'\"`,") & set(text)
        return f"{name}={_as_typed(text)}" if plain else item
    value = parsed._value  # with the quotes that `value()` takes off
    if limits.is_text(kind) and (
        isinstance(value, list | dict) or (override_key(item) == "resume" and parsed.is_sweep_override())
    ):
        return f"{name}={_as_typed(text)}"  # brackets in a name; a run to resume is one run
    if isinstance(value, ChoiceSweep):
        listed = text if value.simple_form else match[1] if (match := _CHOICE.fullmatch(text)) else None
        parts = _split(listed) if listed is not None else []
        if len(parts) != len(value.list):
            return item
        texts = [_as_text(element, part) for element, part in zip(value.list, parts, strict=True)]
        return f"{name}={','.join(texts)}" if len(texts) > 1 else f"{name}=choice({texts[0]})"
    return f"{name}={_as_text(value, text)}"


def _as_typed(text: str) -> str:
    """Quoted, but `${...}` stays the interpolation that it looks like."""
    return QuotedString(text, Quote.single).with_quotes()


def _as_text(value: Any, text: str) -> str:
    """The element `text`, which Hydra reads as `value`, with every number and flag in it made a string."""
    if isinstance(value, bool | int | float):
        return text if text.endswith(")") else quoted(text)  # str(..), int(..): a cast says itself what it means
    if isinstance(value, list) and text.startswith("["):
        parts = _split(text[1:-1])
        if len(parts) == len(value):
            return f"[{','.join(_as_text(element, part) for element, part in zip(value, parts, strict=True))}]"
    return text


def _split(text: str) -> list[str]:
    """At the commas outside of quotes and brackets; [] of an empty text."""
    parts, depth, quote, start, escaped = [], 0, "", 0, False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()] if text.strip() else []
