"""The typed schema of every config group: field names, types and units. No defaults live here.

Every field is mandatory (`MISSING`) so that the one place for a default is `conf/`; the comment beside a
field says what it means. Hydra composes `conf/` on top of these classes, which is why a misspelt key
in any YAML file fails. This module imports neither torch nor ray: tab completion and `--cfg job` load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Optional

from omegaconf import MISSING

# OmegaConf matches enums by member NAME, so members are spelt as users type them.


class Format(Enum):
    """How one weight tensor is stored and computed with."""

    bf16 = "bf16"
    int4 = "int4"  # W4A16, symmetric group quantization
    int8 = "int8"  # W8A16, converter only
    fp8 = "fp8"  # e4m3, 128 x 128 blocks, fp32 scales
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"


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


class Estimator(Enum):
    grpo = "grpo"
    gspo = "gspo"
    cispo = "cispo"
    reinforce_pp = "reinforce_pp"


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


@dataclass
class ModelConfig:
    name: str = MISSING
    family: str = MISSING  # a file of runner/models: qwen3, qwen3_moe, deepseek, mimo, qwen3_vl
    hf_checkpoint: Optional[str] = MISSING  # a folder or hub id; null: random start (tiny models)
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_size: int = MISSING  # of a dense mlp
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    vocab_size: int = MISSING
    max_context_tokens: int = MISSING
    rope_theta: float = MISSING
    norm_eps: float = MISSING
    tied_embeddings: bool = MISSING
    attention_bias: bool = MISSING
    qk_norm: bool = MISSING
    initializer_range: float = MISSING
    # mixture of experts; num_experts 0 is a dense model
    num_experts: int = MISSING
    experts_top_k: int = MISSING
    expert_ffn_size: int = MISSING
    num_shared_experts: int = MISSING
    num_dense_layers: int = MISSING  # first layers without experts
    router_score: str = MISSING  # softmax or sigmoid
    router_bias: bool = MISSING  # selection bias of aux-loss-free balancing
    routed_scaling_factor: float = MISSING
    expert_groups: int = MISSING  # the router first chooses groups of experts (DeepSeek-V3: 4 of 8); 1: it does not
    expert_groups_top_k: int = MISSING
    # multi-head latent attention; kv_lora_rank 0 is plain attention
    q_lora_rank: int = MISSING  # 0: no low-rank query
    kv_lora_rank: int = MISSING
    qk_nope_head_dim: int = MISSING
    qk_rope_head_dim: int = MISSING
    v_head_dim: int = MISSING
    num_mtp_layers: int = MISSING
    vision: bool = MISSING
    int4_group_size: int = MISSING  # default of precision.group_size under precision=int4_*
    toy_twin: str = MISSING  # the tiny model that scale=laptop puts in this one's place


@dataclass
class GridConfig:
    """A weight format and its grid on one side of the loop."""

    format: Format = MISSING
    group_size: int = MISSING  # weights along the input dimension that share a scale; -1: per output channel
    convention: Convention = MISSING


@dataclass
class PrecisionConfig:
    name: str = MISSING
    group_size: int = MISSING  # the one knob: train.group_size and rollout.group_size follow it
    convention: Convention = MISSING  # likewise
    roles: Optional[list[Role]] = MISSING  # null: routed experts of a MoE model, the mlp of a dense one
    train: GridConfig = field(default_factory=GridConfig)
    rollout: GridConfig = field(default_factory=GridConfig)
    qat_placement: QatPlacement = MISSING
    base_dtype: str = MISSING  # of everything that is not quantized: bfloat16, or float32 for tests
    kv_cache: str = MISSING  # bf16 or fp8_e4m3
    fp8_backward: bool = MISSING  # precision=fp8: quantize gradients in the backward too
    fp8_matmul: str = MISSING  # precision=fp8: simulated (in bf16) or scaled_mm (trainer=torch on a Hopper GPU)
    fp8_param_gather: bool = MISSING  # Megatron: all-gather parameters in FP8
    cpu_matmul: CpuMatmul = MISSING  # how a CPU multiplies bf16 matrices


@dataclass
class ParallelismConfig:
    name: str = MISSING
    gpus: int = MISSING  # of the trainer, over all nodes; 0: the CPU of this machine
    ranks: int = MISSING  # trainer processes; equals gpus where there are any
    tp: int = MISSING
    pp: int = MISSING
    cp: int = MISSING
    ep: int = MISSING
    etp: int = MISSING
    sequence_parallel: bool = MISSING
    last_stage_layers: Optional[int] = MISSING  # null: an even split
    gpus_per_engine: int = MISSING
    engine_ep: int = MISSING
    rollout_gpus: int = MISSING  # equals gpus when colocated; 0: the CPU
    colocate: bool = MISSING  # trainer and rollout take turns on the same GPUs


@dataclass
class OptimizerConfig:
    lr: float = MISSING
    lr_schedule: str = MISSING  # constant, linear or cosine
    lr_warmup_steps: int = MISSING
    lr_min_ratio: float = MISSING  # of lr, where linear and cosine end
    weight_decay: float = MISSING
    beta1: float = MISSING
    beta2: float = MISSING
    eps: float = MISSING
    clip_grad_norm: float = MISSING
    cpu_offload: bool = MISSING


@dataclass
class TrainerConfig:
    _target_: str = MISSING
    name: str = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    max_tokens_per_gpu: int = MISSING  # tokens of one micro-batch
    recompute: str = MISSING  # none, selective or full
    max_nan_steps: int = MISSING  # consecutive skipped steps after which the run stops
    logprob_chunk_tokens: int = MISSING  # positions whose [tokens, vocab] fp32 logits exist at one time
    threads: int = MISSING  # CPU threads; 0: all


@dataclass
class TorchTrainerConfig(TrainerConfig):
    master_weights: bool = MISSING  # fp32 masters of bf16 weights; false: train base_dtype weights directly
    device: str = MISSING  # auto, cpu, cuda


@dataclass
class MegatronTrainerConfig(TrainerConfig):
    distributed_optimizer: bool = MISSING
    overlap_param_gather: bool = MISSING
    overlap_grad_reduce: bool = MISSING
    gradient_accumulation_fusion: bool = MISSING
    precision_aware_optimizer: bool = MISSING
    router_fusion: bool = MISSING
    moe_token_dispatcher: str = MISSING  # alltoall, allgather or flex
    resident_reference: bool = MISSING  # false: reference weights are swapped in from host memory
    grad_bucket_elements: Optional[int] = MISSING  # parameters per communication bucket; null: Megatron's choice
    rank_timeout_seconds: float = MISSING  # a rank that is silent for this long counts as dead
    initial_checkpoint: Optional[str] = MISSING  # of another run, whose weights this one starts from; any layout
    async_save: bool = MISSING  # write checkpoints beside the next steps, from processes forked at their moment
    max_restarts: int = MISSING  # of all ranks from the last checkpoint after one died; 0: the run ends


@dataclass
class SamplingConfig:
    temperature: float = MISSING
    top_p: float = MISSING
    top_k: int = MISSING  # -1: all
    max_response_tokens: int = MISSING


@dataclass
class RolloutSamplingConfig(SamplingConfig):
    stop_token_ids: list[int] = field(default_factory=list)  # end a sample beside those that the checkpoint names


@dataclass
class RolloutConfig:
    _target_: str = MISSING
    name: str = MISSING
    sampling: RolloutSamplingConfig = field(default_factory=RolloutSamplingConfig)
    max_concurrency: int = MISSING  # sequences decoded at one time, per engine
    request_timeout_seconds: float = MISSING


@dataclass
class LocalRolloutConfig(RolloutConfig):
    device: str = MISSING  # auto, cpu, cuda
    kv_cache_tokens: int = MISSING  # slots over all running sequences; 0: from max_concurrency
    prefill_chunk_tokens: int = MISSING


@dataclass
class SglangRolloutConfig(RolloutConfig):
    memory_fraction: float = MISSING  # of a GPU's memory, for weights and KV cache
    attention_backend: str = MISSING  # auto, or a name that SGLang knows
    weight_transport: str = MISSING  # tensor, distributed, disk_full, disk_delta or p2p
    transfer_protocol: str = MISSING  # of p2p: rdma, or tcp
    transfer_devices: list[str] = field(default_factory=list)  # of p2p: RDMA devices (mlx5_0, ..); all if empty
    pause_mode: str = MISSING  # abort, retract or in_place
    startup_timeout_seconds: float = MISSING
    health_interval_seconds: float = MISSING  # between looks at whether an engine still works; 0: never
    cpu_engines: int = MISSING  # servers on this machine's CPU, where parallelism.rollout_gpus is 0
    cpu_tp: int = MISSING  # tensor-parallel ranks of each of them
    max_retries: int = MISSING
    use_router: bool = MISSING
    cuda_graph_max_batch: int = MISSING
    chunked_prefill_tokens: int = MISSING
    server_args: dict[str, Any] = field(default_factory=dict)  # further SGLang options, checked by name


@dataclass
class RouterReplayConfig:
    name: str = MISSING
    trainer: bool = MISSING  # replay recorded routes in every trainer pass
    rollout: bool = MISSING  # record routes in the engine


@dataclass
class SpeculativeConfig:
    name: str = MISSING
    method: str = MISSING  # none, ngram, draft, mtp or eagle
    num_draft_tokens: int = MISSING
    ngram_min: int = MISSING  # shortest suffix that is looked up
    ngram_max: int = MISSING
    draft_model: Optional[str] = MISSING  # a folder with a model of the same vocabulary
    online_training: bool = MISSING  # of the draft (MTP heads)
    auto_disable: bool = MISSING  # switch off, as a recorded decision, when slower than plain decoding
    auto_disable_after_steps: int = MISSING  # engine steps of each kind that are measured first
    mtp_loss_coef: float = MISSING


@dataclass
class TaskConfig:
    _target_: str = MISSING
    name: str = MISSING
    train_path: Optional[str] = MISSING  # a JSONL file or hub id
    eval_path: Optional[str] = MISSING
    max_prompt_tokens: int = MISSING
    reward_timeout_seconds: float = MISSING
    max_turns: int = MISSING
    seed: int = MISSING  # of prompt order and generated problems; follows the run's seed


@dataclass
class ArithmeticTaskConfig(TaskConfig):
    operands: int = MISSING  # numbers that are added
    digits: int = MISSING  # of each number, at most
    eval_problems: int = MISSING  # held out from training


@dataclass
class JsonlTaskConfig(TaskConfig):
    """gsm8k, dapo_math: a prompt and a reference answer per line."""

    prompt_template: str = MISSING
    max_train_problems: int = MISSING  # 0: all
    max_eval_problems: int = MISSING


@dataclass
class VisualCountTaskConfig(TaskConfig):
    grid: int = MISSING  # cells per side of the image
    cell_pixels: int = MISSING  # side of a cell
    colors: int = MISSING  # kinds of colour, of red, green, blue, yellow
    shapes: int = MISSING  # kinds of shape, of square, triangle, circle
    max_count: int = MISSING  # largest answer; answers are drawn evenly
    clutter: float = MISSING  # share of the other cells that hold another shape
    noise: int = MISSING  # gray levels by which a pixel may be off
    eval_problems: int = MISSING  # held out from training


@dataclass
class Geo3kTaskConfig(JsonlTaskConfig):
    min_image_pixels: int = MISSING  # images are resized to whole tokens with this many pixels at least
    max_image_pixels: int = MISSING  # and this many at most


@dataclass
class CorrectionBounds:
    low: float = MISSING
    high: float = MISSING


@dataclass
class AlgorithmConfig:
    name: str = MISSING
    estimator: Estimator = MISSING
    samples_per_prompt: int = MISSING
    prompts_per_step: int = MISSING
    updates_per_rollout: int = MISSING  # optimizer steps made from one rollout's samples
    normalize_by_std: bool = MISSING  # GRPO divides advantages by the group's standard deviation
    clip_low: float = MISSING
    clip_high: float = MISSING
    dual_clip: float = MISSING  # bounds the loss of a negative advantage at this ratio; 0: it does not
    loss_aggregation: LossAggregation = MISSING
    kl_coef: float = MISSING  # 0: no reference model
    kl_estimator: str = MISSING  # k1, k2 or k3
    entropy_coef: float = MISSING
    dynamic_sampling: bool = MISSING  # drop groups of equal reward and draw others
    max_resample_rounds: int = MISSING
    oversample_prompts: int = MISSING  # prompts asked for at a time; 0: prompts_per_step
    correction: Correction = MISSING
    correction_low: float = MISSING
    correction_high: float = MISSING
    correction_bounds: dict[str, CorrectionBounds] = field(default_factory=dict)  # where those two are not given


@dataclass
class ClusterConfig:
    name: str = MISSING
    launcher: str = MISSING  # local, ray, slurm or k8s
    nodes: int = MISSING
    gpus_per_node: int = MISSING  # 0: a machine without GPUs
    gpu_memory_gib: float = MISSING
    host_memory_gib: float = MISSING
    address: Optional[str] = MISSING
    interface: Optional[str] = MISSING  # a network interface or an IPv4 address, for servers and weight broadcasts


@dataclass
class TrackingConfig:
    name: str = MISSING
    wandb_mode: str = MISSING  # offline, online or disabled
    project: str = MISSING
    entity: Optional[str] = MISSING
    group: Optional[str] = MISSING
    tags: list[str] = field(default_factory=list)


@dataclass
class WarmStartConfig:
    """Supervised steps on worked solutions before RL, cached under outputs/ by what they depend on."""

    enabled: bool = MISSING
    max_steps: int = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    stop_at_reward: float = MISSING  # ends as soon as sampled success reaches this
    check_interval_steps: int = MISSING
    cache: bool = MISSING


@dataclass
class EvalConfig:
    interval_steps: int = MISSING  # 0: never
    num_prompts: int = MISSING
    samples_per_prompt: int = MISSING  # also the k of pass@k
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class CheckpointConfig:
    interval_steps: int = MISSING  # 0: only at the end
    keep: int = MISSING  # complete checkpoints that stay


@dataclass
class MismatchConfig:
    decompose_interval_steps: int = MISSING  # 0: never
    decompose_samples: int = MISSING
    probe_sequences: int = MISSING  # fixed sequences scored on both sides after every weight sync
    residency_tensors: int = MISSING  # tensors compared per sync with what is resident (all at the first)


@dataclass
class WatchRuleConfig:
    """Compare a metric with a bound or with its own running mean."""

    metric: str = MISSING
    above: Optional[float] = MISSING
    below: Optional[float] = MISSING
    jump_ratio: Optional[float] = MISSING  # value over its running mean of earlier steps; under 1: fires below it
    jump_floor: Optional[float] = MISSING  # a jump to less than this is noise
    drop_against_baseline: Optional[float] = MISSING  # absolute, against `baseline_run` at the same step
    patience_steps: int = MISSING  # consecutive steps that must break the rule
    action: WatchAction = MISSING
    enabled: bool = MISSING


@dataclass
class WatchConfig:
    baseline_run: Optional[str] = MISSING  # a run folder
    window_steps: int = MISSING
    rules: dict[str, WatchRuleConfig] = field(default_factory=dict)


@dataclass
class ConvertConfig:
    source: Optional[str] = MISSING
    target: Optional[str] = MISSING
    method: str = MISSING  # rtn or gptq
    format: Optional[str] = MISSING  # null: the precision's rollout format; else bf16, int8, fp8_channel, fp8_tensor
    workers: int = MISSING
    calibration: Optional[str] = MISSING  # for gptq: a JSONL file or hub id; lines with text, question and answer, or messages
    calibration_samples: int = MISSING
    calibration_tokens: int = MISSING
    damping: float = MISSING
    gptq_python: str = MISSING  # the Python of the environment with llmcompressor; relative to the repository


@dataclass
class Config:
    """One run. Group order follows the loop: what is trained, how, where, on what, and what is kept."""

    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    router_replay: RouterReplayConfig = field(default_factory=RouterReplayConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    recipe: str = MISSING  # the recipe's name, or none
    scale: str = MISSING  # full or laptop
    steps: int = MISSING  # rollouts, each followed by algorithm.updates_per_rollout optimizer steps
    seed: int = MISSING
    outputs_dir: str = MISSING
    run_name: Optional[str] = MISSING  # null: time and the groups that differ from the default
    resume: Optional[str] = MISSING  # a run folder or its name
