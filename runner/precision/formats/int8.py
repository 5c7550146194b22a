"""int8: as int4 with one byte a weight (W8A16), for converting checkpoints only.

weight_packed int32 [out, in / 4], weight_scale bf16 [out, groups], weight_shape int64 [2]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner.config.schema import Convention
from runner.errors import UserError
from runner.precision.formats.int4 import Integer
from runner.precision.tensor_format import TensorFormat

if TYPE_CHECKING:
    pass


class Int8(Integer):
    name = "int8"
    bits = 8
    converter_only = True

    def grid(self, group_size: int, convention: Convention | None, strategy: str) -> TensorFormat:
        found = super().grid(group_size, convention, strategy)
        if convention is Convention.exact:
            raise UserError(
                "convention exact does not exist for int8: 7-bit integers leave one bit for the scale",
                key="precision.convention",
                fix="precision.convention=llmcompressor",
            )
        return found


FORMAT = Int8()
