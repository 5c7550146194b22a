"""The parts of a decoder layer between its matmuls, one numba kernel each, for scores token batches on a CPU.

torch spends 5 to 30 microseconds per operation on tensors as small as a decode step's, and a layer has about a hundred
of them; these kernels make it five. They round to the activations' dtype where transformers' modules do, so that what
comes out differs from them by the order of additions only, and a token's result does not depend on its batch.

bf16 arrays come as uint16 (their bits), fp32 arrays as float32: every kernel takes both. All release the GIL.

lanes.py numbers and vectors; attention.py; experts.py routing; matmul.py torch's matmuls; layers.py half a layer per call;
sampling.py the next token; cache.py when compiled code may be used again.

Shape legend: N tokens, H hidden, K experts per token, E experts, I expert ffn, h query heads, n key-value heads, d head
size, V vocabulary.
"""

from runner.rollout.local.cpu_kernels.attention import add_norm, attend
from runner.rollout.local.cpu_kernels.experts import ROW_BLOCK, expert_layout, gate_activation, route, spread
from runner.rollout.local.cpu_kernels.layers import attention_block, dense_block, expert_block, room_for_experts
from runner.rollout.local.cpu_kernels.matmul import TensorHandle, expert_products, product
from runner.rollout.local.cpu_kernels.sampling import draw_rows

__all__ = [
    "ROW_BLOCK",
    "TensorHandle",
    "add_norm",
    "attend",
    "attention_block",
    "dense_block",
    "draw_rows",
    "expert_block",
    "expert_layout",
    "expert_products",
    "gate_activation",
    "product",
    "room_for_experts",
    "route",
    "spread",
]
