"""The byte tokenizer of models without a checkpoint, and loading the tokenizer of one with a checkpoint."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runner.errors import UserError
from runner.models.vocabulary import FIRST_BYTE_ID, SPECIAL_TOKENS, VOCAB_SIZE
from runner.schema import ModelConfig

# what transformers makes of a file with values that it does not expect
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, ids fixed by runner/models/vocabulary.py; saves to files that every engine loads.

    It is byte-level BPE without merges, so digits are single tokens and any text round-trips.
    """
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for byte, character in _byte_characters().items():
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


def _byte_characters() -> dict[int, str]:
    """byte -> the printable character that stands for it in byte-level BPE (GPT-2's table, which tokenizers uses).

    Printable Latin-1 stands for itself; the other bytes, in order, take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return table


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
        tokenizer = AutoTokenizer.from_pretrained(model.hf_checkpoint, trust_remote_code=model.trust_remote_code)
    except LOADING_ERRORS as error:
        raise UserError(
            f"cannot load the tokenizer of '{model.hf_checkpoint}': {_first_line(error)}",
            key="model.hf_checkpoint",
            fix="give a local folder or a hub id that this machine can reach",
        ) from error
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"the tokenizer of '{model.hf_checkpoint}' has {len(tokenizer)} ids, the model {model.vocab_size} embeddings",
            key="model.vocab_size",
            fix="use the checkpoint's own tokenizer and the vocab_size of its config.json",
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
