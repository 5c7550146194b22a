"""The token ids that end a sample: those of the tokenizer, of generation_config.json and of config.json together.

A chat model often ends a turn with another id than its tokenizer's eos, and says so in generation_config.json alone: Moonlight's
and Kimi-K2's tokenizers name [EOS] (163585) and their generation_config.json <|im_end|> (163586).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models.published import file_of

GENERATION_CONFIG = "generation_config.json"
CONFIG = "config.json"
KEY = "rollout.sampling.stop_token_ids"


@dataclass(frozen=True)
class EndTokens:
    """ids: what ends a sample, ascending; sources: (where they are named, ids); unused: ids that no embedding belongs to."""

    ids: tuple[int, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    unused: tuple[int, ...]
    last: int  # what a worked solution ends with: the tokenizer's eos where it has one

    def summary(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """One line: every id with its token, and where each comes from."""
        named = ", ".join(f"{index} {tokenizer.convert_ids_to_tokens(index)}" for index in self.ids[:8])
        more = f" and {len(self.ids) - 8} more" if len(self.ids) > 8 else ""
        where = "; ".join(f"{source}: {_short(ids)}" for source, ids in self.sources)
        return f"a sample ends at {named}{more} ({where})"

    def without_last(self, ids: list[int]) -> list[int]:
        """Response ids without the one that ended it, which is no part of the answer."""
        return ids[:-1] if ids and ids[-1] in self.ids else ids


def end_tokens(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, extra: Iterable[int]) -> EndTokens:
    """The union of all that the checkpoint and `extra` (rollout.sampling.stop_token_ids) name.

    UserError when there is none, when a file names something that is no id, or `extra` one that the model does not have.
    """
    found: list[tuple[str, tuple[int, ...]]] = []
    if tokenizer.eos_token_id is not None:
        found.append(("tokenizer", _ids(tokenizer.eos_token_id, "the tokenizer")))
    for name in (GENERATION_CONFIG, CONFIG):
        values = read_checkpoint_json(model, name)
        for place, section in ((name, values), (f"{name} text_config", values.get("text_config"))):
            if isinstance(section, dict) and section.get("eos_token_id") not in (None, []):
                found.append((place, _ids(section["eos_token_id"], f"{place} of '{model.hf_checkpoint}'")))
    given = tuple(extra)
    outside = [index for index in given if not 0 <= index < model.vocab_size]
    if outside:
        raise UserError(
            f"{_short(outside)}: the model has the ids 0 to {model.vocab_size - 1}",
            key=KEY,
            fix="leave out what is not among them",
        )
    if given:
        found.append((KEY, given))
    named = {index for _, ids in found for index in ids}
    usable = tuple(sorted(index for index in named if 0 <= index < model.vocab_size))
    if not usable:
        what = "an end token with an embedding" if named else "an end token"
        raise UserError(
            f"'{model.hf_checkpoint}' does not name {what}: its tokenizer has no eos_token, and neither {GENERATION_CONFIG} "
            f"nor {CONFIG} an eos_token_id that its model has; every sample would run to max_response_tokens",
            key=KEY,
            fix=f"{KEY}=[<id>, ..], or add eos_token to the checkpoint's tokenizer_config.json",
        )
    own = tokenizer.eos_token_id
    last = own if isinstance(own, int) and own in usable else usable[0]
    return EndTokens(usable, tuple(found), tuple(sorted(named - set(usable))), last)


def unlisted_turn_end(tokenizer: PreTrainedTokenizerBase, ends: EndTokens) -> str | None:
    """The special token with which the chat template closes an assistant's turn, where it is none of `ends`; else None."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    mark = "the assistant's words"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": mark}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template runs code of its own and refuses conversations in many ways; prompts meet that elsewhere
        return None
    after = text.rpartition(mark)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False).input_ids[:1] if mark in text and after else []
    if not ids or ids[0] in ends.ids or ids[0] not in tokenizer.added_tokens_decoder:
        return None
    return str(tokenizer.convert_ids_to_tokens(ids[0]))


def read_checkpoint_json(model: ModelConfig, name: str) -> dict[str, Any]:
    """A JSON object beside the checkpoint's weights; {} without a checkpoint or such a file. UserError when it is damaged."""
    path = checkpoint_file(model, name)
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not JSON: {first}", key="model.hf_checkpoint", fix="download that file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object", key="model.hf_checkpoint", fix="download that file again")
    return value


def checkpoint_file(model: ModelConfig, name: str) -> Path | None:
    """Where a file of the checkpoint, a folder or a hub id, lies on this machine; None where there is none."""
    if model.hf_checkpoint is None:
        return None
    try:
        return file_of(model.hf_checkpoint, name)
    except (OSError, ValueError):  # what cannot be read at all is reported by those that load tokenizer and weights
        return None


def _ids(value: Any, place: str) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    wrong = [entry for entry in values if isinstance(entry, bool) or not isinstance(entry, int)]
    if wrong:
        raise UserError(
            f"{place}: eos_token_id {str(wrong[0])[:40]!r} is no token id",
            key="model.hf_checkpoint",
            fix="mend that file: eos_token_id is an integer or a list of integers",
        )
    return tuple(values)


def _short(ids: Iterable[int]) -> str:
    listed = list(ids)
    return ", ".join(map(str, listed[:4])) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
