"""Ids of the byte tokenizer that models without a checkpoint use; the tokenizer is built in runner/models/tokenizer.py.

Sixteen special ids, then one id per byte: any text round-trips, every id is fixed, and 272 is a multiple of 16.
"""

from __future__ import annotations

PAD_ID = 0
EOS_ID = 1
VISION_START_ID = 2
VISION_END_ID = 3
IMAGE_ID = 4
VIDEO_ID = 5
FIRST_BYTE_ID = 16
VOCAB_SIZE = FIRST_BYTE_ID + 256

_NAMED = ("<pad>", "<eos>", "<vision_start>", "<vision_end>", "<image>", "<video>")
SPECIAL_TOKENS = (*_NAMED, *(f"<reserved_{i}>" for i in range(len(_NAMED), FIRST_BYTE_ID)))


def byte_characters() -> dict[int, str]:
    """byte -> the printable character that stands for it in byte-level BPE (GPT-2's table, which tokenizers uses).

    Printable Latin-1 stands for itself; the other bytes, in order, take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return table
