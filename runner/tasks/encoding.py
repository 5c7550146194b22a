"""Text of a data file becomes tokens: control tokens come from the chat template and the prompt template, never from the data.

A special token's text in the data (`<eos>`, `<|im_end|>`) is put aside as one private character before the templates are filled
in, and tokenized as the plain text that it is afterwards. Prompts without one are tokenized whole, as ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FIRST_PRIVATE = 0xF0000  # of Unicode's private plane, where no text of a data set lies
MAX_CHARACTERS_PER_TOKEN = 512  # on average; the longest tokens of published vocabularies are runs of 128 blanks


class TextEncoder:
    """`hide` the data's text, fill in templates, then `encode`; `show` gives the text that people read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = sorted({token.content for token in added if token.special and token.content}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        self._character = {text: chr(FIRST_PRIVATE + index) for index, text in enumerate(special)}
        self._text = {character: text for text, character in self._character.items()}
        last = FIRST_PRIVATE + max(len(special), 1) - 1
        self._private = re.compile(f"[{chr(FIRST_PRIVATE)}-{chr(last)}]")

    def hide(self, value: Any) -> Any:
        """The text (or lists and dicts of texts) with private characters where it names special tokens.

        ValueError for a text that holds such a character already, or half a character (a lone surrogate).
        """
        if isinstance(value, dict):
            return {key: self.hide(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(entry) for entry in value]
        if not isinstance(value, str):
            return value
        check_characters(value)
        if self._special is None:
            return value
        if found := self._private.search(value):
            raise ValueError(f"the private character U+{ord(found[0]):X} cannot be part of a prompt")
        return self._special.sub(lambda match: self._character[match[0]], value)

    def show(self, text: str) -> str:
        return self._private.sub(lambda match: self._text[match[0]], text) if self._text else text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts whose data was hidden. ValueError where the tokenizer cannot write a special token as text."""
        whole = [text for text in texts if not self._private.search(text)]
        ids = iter(self.tokenizer(whole, add_special_tokens=False).input_ids if whole else [])
        return [self._encode_parts(text) if self._private.search(text) else next(ids) for text in texts]

    def _encode_parts(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({self._private.pattern})", text):
            if part in self._text:
                ids += self._as_text(self._text[part])
            elif part:
                ids += self.tokenizer(part, add_special_tokens=False).input_ids
        return ids

    def _as_text(self, special: str) -> list[int]:
        ids: list[int] = self.tokenizer(special, add_special_tokens=False, split_special_tokens=True).input_ids
        control = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        if control & set(ids) or not ids:
            raise ValueError(f"the text {special} is a control token, which this tokenizer cannot write as plain text")
        return ids


def check_characters(text: str) -> None:
    r"""ValueError for half a character: JSON can write `\ud800`, which is no text and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character (lone surrogate \\u{ord(text[error.start]):04x}) at place {error.start}") from None


def check_length(messages: Iterable[dict[str, str]], max_tokens: int) -> None:
    """ValueError for a conversation that is far too long to be tried: a tokenizer takes minutes for 100 MB."""
    characters = sum(len(message["content"]) for message in messages)
    if characters > max_tokens * MAX_CHARACTERS_PER_TOKEN:
        raise ValueError(f"{characters} characters, far more than task.max_prompt_tokens={max_tokens} tokens hold")
