"""The tokenizer of Moonlight and Kimi-K2: byte pairs in `tiktoken.model`, which their folders accompany with code of their own.

That code is never run. What it does is small and published: tiktoken with one split pattern, special tokens by id from
tokenizer_config.json, long texts cut into pieces. All of it is done here, by tiktoken itself, so ids are equal by construction.
"""

from __future__ import annotations

import ast
import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
from transformers import AddedToken, PreTrainedTokenizer

from runner.models.vocabulary import byte_characters

CLASS = "TikTokenTokenizer"  # `tokenizer_class` of tokenizer_config.json
FILE = "tiktoken.model"
RESERVED = 256  # ids behind the byte pairs that special tokens share; those without a name are <|reserved_token_ID|>
PIECE_CHARS = 400_000  # of a text that tiktoken is given at a time
RUN_CHARS = 25_000  # of letters without a space, or of spaces, that it is given at a time

# The split pattern of the published tokenization_moonshot.py (Moonlight) and tokenization_kimi.py (Kimi-K2): Han characters
# by themselves, words with their case and English endings, up to three digits, punctuation, line ends, spaces.
_LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_UPPER, _LOWER, _ENDING = rf"[\p{{Lu}}\p{{Lt}}{_LETTERS}]", rf"[\p{{Ll}}{_LETTERS}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def encoding_of(ranks: dict[bytes, int], named: dict[int, str], embeddings: int) -> tiktoken.Encoding:
    """tiktoken's encoder of these byte pairs and special tokens (id -> text) for a model with so many embeddings.

    Reserved ids end where the embeddings do: the published code names two more, which no embedding has.
    ValueError when the byte pairs are not numbered 0, 1, ..., or a special token lies among them or behind the embeddings.
    """
    base = len(ranks)
    if sorted(ranks.values()) != list(range(base)):
        raise ValueError(f"the {base} byte pairs of {FILE} are not numbered from 0 to {base - 1}")
    for token, text in named.items():
        if token < base:
            raise ValueError(f"special token {text!r} has id {token}, which is one of the {base} byte pairs of {FILE}")
    if max([base - 1, *named]) >= embeddings:
        raise ValueError(f"its tokens have ids up to {max([base - 1, *named])}, the model has {embeddings} embeddings")
    last = max([min(base + RESERVED, embeddings) - 1, *named])
    special = {named.get(token, f"<|reserved_token_{token}|>"): token for token in range(base, last + 1)}
    return tiktoken.Encoding(FILE, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of a token -> its id, from lines of "base64 id". ValueError for another file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        token, _, rank = line.strip().partition(b" ")
        if not token:
            continue
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} of {FILE} is not a token in base64 and its id") from None
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{FILE} does not have all 256 single bytes")
    return ranks


def other_pattern(code: str) -> str | None:
    """The split pattern that a tokenization_*.py assigns to `pat_str`, where it is another one than PATTERN; the code is parsed,
    not run. None for the same pattern, and for code without one."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(getattr(name, "id", None) == "pat_str" for name in node.targets):
            texts = [
                part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            found = "|".join(text for text in texts if text != "|")
            if found != PATTERN:
                return found
    return None


class TiktokenTokenizer(PreTrainedTokenizer):
    """transformers' interface to `encoding_of`; its ids and texts are those of the published class, which is not used."""

    vocab_files_names = {"vocab_file": FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, embeddings: int, added_tokens_decoder: dict[int, AddedToken], **kwargs: Any) -> None:
        """`embeddings`: rows of the model's embedding; everything else comes from tokenizer_config.json.

        ValueError for a file that is not what it should be, and for a named special token without an id.
        """
        self.vocab_file = vocab_file
        named = {index: token.content for index, token in added_tokens_decoder.items()}
        self.encoding = encoding_of(read_ranks(Path(vocab_file)), named, embeddings)
        self._tokens = [self._text_of(index) for index in range(self.encoding.n_vocab)]
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if kwargs.get(key) is not None and str(kwargs[key]) not in self.encoding.special_tokens_set:
                raise ValueError(f"{key} {str(kwargs[key])!r} has no id in `added_tokens_decoder` of tokenizer_config.json")
        super().__init__(added_tokens_decoder=added_tokens_decoder, **kwargs)

    def _text_of(self, index: int) -> str:
        """A special token's own text; a character per byte of the others."""
        token = self.encoding.decode_single_token_bytes(index)
        return token.decode() if self.encoding.is_special_token(index) else "".join(_CHARACTERS[byte] for byte in token)

    def ids_of(self, text: str, *, specials: bool = True) -> list[int]:
        """Token ids of a text; `specials` False takes the text of a special token for ordinary text."""
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self.encoding.encode(piece, allowed_special="all") if specials else self.encoding.encode_ordinary(piece)
        return ids

    # ---- what transformers' base class asks for

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Texts become ids here: by way of token strings, two tokens of one string would be one id."""
        specials = not kwargs.get("split_special_tokens", self.split_special_tokens)

        def ids(value: Any) -> Any:
            if isinstance(value, str) and value:
                return self.ids_of(value, specials=specials)
            return [ids(item) for item in value] if isinstance(value, list | tuple) else value

        if kwargs.get("is_split_into_words"):
            return super()._encode_plus(text, text_pair, **kwargs)
        return super()._encode_plus(ids(text), ids(text_pair), **kwargs)

    def _decode(  # type: ignore[override]
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        """Bytes that are not UTF-8 become U+FFFD; ids without a token are left out."""
        left_out = set(self.all_special_ids) if skip_special_tokens else set()
        ids = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        return self.encoding.decode([token for token in ids if token not in left_out and 0 <= token < len(self._tokens)])

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return self._ids

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        specials = not kwargs.get("split_special_tokens", self.split_special_tokens)
        return [self._tokens[index] for index in self.ids_of(text, specials=specials)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, self.unk_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode([self._ids[token] for token in tokens])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies tiktoken.model; without the published code beside it only runner reads what lies there then."""
        target = Path(save_directory) / (f"{filename_prefix}-" if filename_prefix else "") / FILE
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


_CHARACTERS = byte_characters()


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that tiktoken takes, whose splitting recurses over long runs; the published code cuts at these places."""
    for start in range(0, len(text), PIECE_CHARS):
        yield from _runs(text[start : start + PIECE_CHARS])


def _runs(text: str) -> Iterator[str]:
    """Cut where more than RUN_CHARS characters in a row are spaces, or are none."""
    first = length = 0
    spaces: bool | None = None
    for place, character in enumerate(text):
        length = length + 1 if character.isspace() is spaces else 1
        spaces = character.isspace()
        if length > RUN_CHARS:
            yield text[first:place]
            first, length = place, 1
    yield text[first:]
