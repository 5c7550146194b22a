"""Texts of the config that name one of a fixed few: what Hydra accepts, and what a wrong one is told about. Torch-free.

OmegaConf matches an enum by member NAME, so members are spelt as users type them, and each value is its name. Those that go on
as texts (to torch, Megatron, SGLang, a message) are StrEnums, compared with `==`: a config that was made by hand may hold the
text itself. What may grow by a file (formats, families, estimators, transports) is `one_of(...)` instead: limits.py.
"""

from __future__ import annotations

from enum import Enum, StrEnum


class Convention(Enum):
    """How an INT4 scale is derived from a group's amax; see runner/precision/int4.py."""

    exact = "exact"
    kimi = "kimi"
    llmcompressor = "llmcompressor"


class Role(Enum):
    """What a parameter does in its model. Quantization is decided by role, never by a name pattern."""

    embedding = "embedding"
    lm_head = "lm_head"
    norm = "norm"
    attention = "attention"
    dense_mlp = "dense_mlp"
    routed_expert = "routed_expert"
    shared_expert = "shared_expert"
    router = "router"
    mtp = "mtp"  # glue of a multi-token-prediction layer (its projection and norms)
    vision = "vision"


class QatPlacement(Enum):
    """Where quantization-aware training quantizes; both give the same bits."""

    in_place = "in_place"  # once per optimizer step, into the bf16 model weights; needs fp32 masters
    forward = "forward"  # fake quantization in every forward (what slime and Miles do); works without masters


class CpuMatmul(Enum):
    """How a CPU multiplies bf16 matrices; both round a sum of exact products once."""

    auto = "auto"  # native where the CPU has bf16 instructions, else what a short measurement says
    native = "native"  # torch's own
    widened = "widened"  # operands to fp32, the result to bf16


class LossAggregation(Enum):
    """What a token's loss weighs; see runner/algorithms/aggregation.py."""

    token_mean = "token_mean"
    sequence_mean = "sequence_mean"
    sequence_mean_of_token_means = "sequence_mean_of_token_means"
    constant_length = "constant_length"


class Correction(StrEnum):
    """Correction of the train-rollout mismatch by importance weights; see runner/algorithms. Strings: keys of the bounds."""

    none = "none"
    tis = "tis"  # truncated importance sampling
    mis = "mis"  # masked importance sampling, whole sequences
    icepop = "icepop"  # masked importance sampling, tokens


class WatchAction(Enum):
    warn = "warn"
    stop = "stop"


class Scale(StrEnum):
    full = "full"
    laptop = "laptop"  # the toy twin, on this machine


class BaseDtype(StrEnum):
    """Of everything that is not quantized."""

    bfloat16 = "bfloat16"
    float32 = "float32"  # for tests


class KvDtype(StrEnum):
    """Of the KV cache."""

    bf16 = "bf16"  # not quantized: precision.base_dtype
    fp8_e4m3 = "fp8_e4m3"

    @property
    def num_bytes(self) -> int | None:
        """Of a quantized value; None: values are not quantized."""
        return 1 if self is KvDtype.fp8_e4m3 else None


class Fp8Matmul(StrEnum):
    """How FP8 training multiplies; see runner/trainer/torch/fp8.py."""

    simulated = "simulated"  # in bf16, anywhere
    scaled_mm = "scaled_mm"  # torch's blockwise FP8 matmul, on a Hopper GPU


class DeviceKind(StrEnum):
    auto = "auto"  # a GPU where there is one
    cpu = "cpu"
    cuda = "cuda"


class Recompute(StrEnum):
    """Which activations the backward computes again; see runner/trainer/recompute.py."""

    none = "none"
    selective = "selective"
    full = "full"


class LrSchedule(StrEnum):
    """Of the learning rate after its warm-up; see runner/trainer/optimizer.py."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class RouterScore(StrEnum):
    """What makes weights of a router's logits."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    top_k_softmax = "top_k_softmax"  # of the chosen experts' logits alone, in the logits' dtype


class Drafting(StrEnum):
    """What proposes tokens in speculative decoding."""

    none = "none"
    ngram = "ngram"
    draft = "draft"
    mtp = "mtp"
    eagle = "eagle"


class TurnCredit(StrEnum):
    """What a turn of a conversation is credited with; see runner/algorithms/advantages.py."""

    none = "none"  # the sum of all rewards, as every other turn
    returns = "returns"  # the rewards from it on


class ObservationRole(StrEnum):
    """As what the text of an environment follows a turn; see runner/turns/codec.py."""

    none = "none"  # plain text
    user = "user"
    tool = "tool"


# What may run beside the update of a step: runner/run/schedules.py. `async` is a word of Python's own: Schedule["async"].
Schedule = StrEnum("Schedule", ["sync", "one_step_off", "async"])


class KlEstimator(StrEnum):
    """See runner/algorithms/losses.py."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class LauncherKind(StrEnum):
    """What starts the processes of a run."""

    local = "local"
    ray = "ray"
    slurm = "slurm"
    k8s = "k8s"


class WandbMode(StrEnum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


class ConvertMethod(StrEnum):
    rtn = "rtn"  # round to nearest
    gptq = "gptq"


class TokenDispatcher(StrEnum):
    """Megatron's, between the ranks of an expert group."""

    alltoall = "alltoall"
    allgather = "allgather"
    flex = "flex"


class TransferProtocol(StrEnum):
    """Of weight_transport=p2p."""

    rdma = "rdma"
    tcp = "tcp"


class PauseMode(StrEnum):
    """What happens to running requests at a weight sync."""

    abort = "abort"  # they come back and go on under the new weights
    retract = "retract"  # their cache is dropped and computed again
    in_place = "in_place"  # they go on over the cache of the old weights
