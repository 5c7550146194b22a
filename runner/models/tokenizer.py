"""The byte tokenizer of models without a checkpoint, and loading the tokenizer of one with a checkpoint."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models import tiktoken_file
from runner.models.published import (
    KEY,
    REACHABLE,
    TOKENIZER_CONFIG,
    file_of,
    first_line,
    location,
    tokenizer_code,
    tokenizer_settings,
)
from runner.models.vocabulary import FIRST_BYTE_ID, SPECIAL_TOKENS, VOCAB_SIZE, byte_characters

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, ids fixed by runner/models/vocabulary.py; saves to files that every engine loads.

    It is byte-level BPE without merges, so digits are single tokens and any text round-trips.
    """
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for byte, character in byte_characters().items():
        vocabulary[character] = FIRST_BYTE_ID + byte
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, or the byte tokenizer when the model has no checkpoint.

    UserError when it cannot be read or has more ids than the model has embeddings.
    """
    if model.hf_checkpoint is None:
        if model.vocab_size < VOCAB_SIZE:
            raise UserError(
                f"{model.name} has no checkpoint and {model.vocab_size} embeddings; the byte tokenizer has {VOCAB_SIZE} ids",
                key="model.vocab_size",
                fix=f"set model.vocab_size={VOCAB_SIZE}",
            )
        return byte_tokenizer()
    try:
        tokenizer = _published(model.hf_checkpoint, model.vocab_size)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(
            f"cannot load the tokenizer of '{model.hf_checkpoint}': {first_line(error)}", key=KEY, fix=REACHABLE
        ) from error
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"the tokenizer of '{model.hf_checkpoint}' has {len(tokenizer)} ids, the model {model.vocab_size} embeddings",
            key="model.vocab_size",
            fix="use the checkpoint's own tokenizer and the vocab_size of its config.json",
        )
    return tokenizer


def _published(checkpoint: str, embeddings: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint from its files of ids and texts; code beside them is not run.

    UserError for one that only its own code can read: transformers would take it for another one of a similar shape.
    """
    settings = tokenizer_settings(checkpoint)
    code, complete = tokenizer_code(settings), file_of(checkpoint, "tokenizer.json") is not None
    ranks = file_of(checkpoint, tiktoken_file.FILE)
    if settings.get("tokenizer_class") == tiktoken_file.CLASS and ranks is not None:
        path = file_of(checkpoint, code) if code else None
        other = tiktoken_file.other_pattern(path.read_text(encoding="utf-8", errors="replace")) if path else None
        if other is not None:
            raise _unreadable(checkpoint, f"{code} splits text by another pattern than the published one, {other!r}")
        return tiktoken_file.TiktokenTokenizer.from_pretrained(location(checkpoint), embeddings=embeddings)
    if not complete and code:
        raise _unreadable(checkpoint, f"it is class {settings.get('tokenizer_class')} in {code}")
    if not complete and ranks is not None:
        raise _unreadable(
            checkpoint, f"{tiktoken_file.FILE} does not say how text is split, and {TOKENIZER_CONFIG} names no class"
        )
    if code:  # complete without it
        return PreTrainedTokenizerFast.from_pretrained(location(checkpoint))
    return AutoTokenizer.from_pretrained(location(checkpoint), trust_remote_code=False)


def _unreadable(checkpoint: str, why: str) -> UserError:
    return UserError(
        f"the tokenizer of '{checkpoint}' cannot be read without running code of the checkpoint, which runner never does: {why}",
        key=KEY,
        fix="put its tokenizer.json into the folder (a tokenizer of the tokenizers library saves one)",
    )
