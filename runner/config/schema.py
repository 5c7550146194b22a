"""The typed schema of every config group: field names, types and units. No defaults live here (but "off", in watch rules).

Every field is mandatory (`MISSING`) so that the one place for a default is `conf/`; the comment beside a
field says what it means, and `number(...)`, `one_of(...)`, `path()` beside its type what it allows (limits.py).
Hydra composes `conf/` on top of these classes, which is why a misspelt key in any YAML file fails.
This module imports neither torch nor ray: tab completion and `--cfg job` load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from runner.config.choices import (
    BaseDtype,
    ConvertMethod,
    Drafting,
    Fp8Matmul,
    KlEstimator,
    KvDtype,
    LauncherKind,
    LrSchedule,
    ObservationRole,
    Recompute,
    RouterScore,
    Scale,
    Schedule,
    TurnCredit,
)
from runner.config.choices import Convention as Convention
from runner.config.choices import Correction as Correction
from runner.config.choices import CpuMatmul as CpuMatmul
from runner.config.choices import LossAggregation as LossAggregation
from runner.config.choices import QatPlacement as QatPlacement
from runner.config.choices import Role as Role
from runner.config.choices import WatchAction as WatchAction
from runner.config.limits import LONGEST_SECONDS, number, numbers, one_of, path


def weight_formats() -> tuple[str, ...]:
    """How a weight tensor may be stored and computed with."""
    from runner.precision import formats

    return formats.names()


def estimators() -> tuple[str, ...]:
    from runner.algorithms import estimators

    return estimators.names()


def model_families() -> tuple[str, ...]:
    from runner.models import FAMILIES

    return tuple(FAMILIES)


@dataclass
class ModelConfig:
    name: str = MISSING
    family: str = one_of(among=model_families)  # a file of runner/models/families
    hf_checkpoint: Optional[str] = path()  # a folder or hub id; null: random start (tiny models)
    num_layers: int = number(ge=1, le=1024)
    hidden_size: int = number(ge=1, le=2**17)
    ffn_size: int = number(ge=0, le=2**20)  # of a dense mlp
    num_heads: int = number(ge=1, le=4096)
    num_kv_heads: int = number(ge=1, le=4096)
    head_dim: int = number(ge=1, le=4096)
    vocab_size: int = number(ge=1, le=2**22)
    max_context_tokens: int = number(ge=1, le=2**24)
    rope_theta: float = number(gt=0, le=1e12)
    norm_eps: float = number(gt=0, le=1)
    tied_embeddings: bool = MISSING
    attention_bias: bool = MISSING
    qk_norm: bool = MISSING
    initializer_range: float = number(ge=0, le=10)
    # mixture of experts; num_experts 0 is a dense model
    num_experts: int = number(ge=0, le=2**14)
    experts_top_k: int = number(ge=0, le=2**14)
    expert_ffn_size: int = number(ge=0, le=2**20)
    num_shared_experts: int = number(ge=0, le=1024)
    num_dense_layers: int = number(ge=0, le=1024)  # first layers without experts
    router_score: RouterScore = MISSING
    router_bias: bool = MISSING  # selection bias of aux-loss-free balancing
    routed_scaling_factor: float = number(gt=0, le=1000)
    expert_groups: int = number(
        ge=1, le=2**14
    )  # the router first chooses groups of experts (DeepSeek-V3: 4 of 8); 1: it does not
    expert_groups_top_k: int = number(ge=1, le=2**14)
    # multi-head latent attention; kv_lora_rank 0 is plain attention
    q_lora_rank: int = number(ge=0, le=2**17)  # 0: no low-rank query
    kv_lora_rank: int = number(ge=0, le=2**17)
    qk_nope_head_dim: int = number(ge=0, le=4096)
    qk_rope_head_dim: int = number(ge=0, le=4096)
    v_head_dim: int = number(ge=0, le=4096)
    num_mtp_layers: int = number(ge=0, le=64)
    vision: bool = MISSING
    int4_group_size: int = number(ge=-1, le=2**20)  # default of precision.group_size under precision=int4_*
    toy_twin: str = MISSING  # the tiny model that scale=laptop puts in this one's place


@dataclass
class GridConfig:
    """A weight format and its grid on one side of the loop."""

    format: str = one_of(among=weight_formats)
    group_size: int = number(ge=-1, le=2**20)  # weights along the input dimension that share a scale; -1: per output channel
    convention: Convention = MISSING


@dataclass
class PrecisionConfig:
    name: str = MISSING
    group_size: int = number(ge=-1, le=2**20)  # the one knob: train.group_size and rollout.group_size follow it
    convention: Convention = MISSING  # likewise
    roles: Optional[list[Role]] = MISSING  # null: routed experts of a MoE model, the mlp of a dense one
    train: GridConfig = field(default_factory=GridConfig)
    rollout: GridConfig = field(default_factory=GridConfig)
    qat_placement: QatPlacement = MISSING
    base_dtype: BaseDtype = MISSING  # of everything that is not quantized: bfloat16, or float32 for tests
    kv_cache: KvDtype = MISSING
    fp8_backward: bool = MISSING  # precision=fp8: quantize gradients in the backward too
    fp8_matmul: Fp8Matmul = MISSING  # precision=fp8: in bf16, or by trainer=torch on a Hopper GPU
    fp8_param_gather: bool = MISSING  # Megatron: all-gather parameters in FP8
    cpu_matmul: CpuMatmul = MISSING  # how a CPU multiplies bf16 matrices


@dataclass
class ParallelismConfig:
    name: str = MISSING
    gpus: int = number(ge=0, le=2**17)  # of the trainer, over all nodes; 0: the CPU of this machine
    ranks: int = number(ge=1, le=2**17)  # trainer processes; equals gpus where there are any
    tp: int = number(ge=1, le=2**17)
    pp: int = number(ge=1, le=2**17)
    cp: int = number(ge=1, le=2**17)
    ep: int = number(ge=1, le=2**17)
    etp: int = number(ge=1, le=2**17)
    sequence_parallel: bool = MISSING
    last_stage_layers: Optional[int] = number(ge=1, le=1024)  # null: an even split
    gpus_per_engine: int = number(ge=0, le=2**17)
    engine_ep: int = number(ge=1, le=2**17)
    rollout_gpus: int = number(ge=0, le=2**17)  # equals gpus when colocated; 0: the CPU
    colocate: bool = MISSING  # trainer and rollout take turns on the same GPUs


@dataclass
class OptimizerConfig:
    lr: float = number(gt=0, le=10)
    lr_schedule: LrSchedule = MISSING
    lr_warmup_steps: int = number(ge=0, le=10**9)
    lr_decay_steps: Optional[int] = number(ge=1, le=10**15)  # optimizer steps of linear and cosine; null: the run's, as it began
    lr_min_ratio: float = number(ge=0, le=1)  # of lr, where linear and cosine end
    weight_decay: float = number(ge=0, le=10)
    beta1: float = number(ge=0, le=1)
    beta2: float = number(ge=0, le=1)
    eps: float = number(gt=0, le=1)
    clip_grad_norm: float = number(gt=0, le=1e9)
    cpu_offload: bool = MISSING


@dataclass
class LoraConfig:
    """runner/trainer/adapters.py"""

    rank: int = number(ge=0, le=2**14)  # 0: whole weights are trained
    alpha: float = number(gt=0, le=1e6)
    targets: Optional[list[Role]] = MISSING  # null: attention, mlps and experts


@dataclass
class TrainerConfig:
    _target_: str = MISSING
    name: str = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    max_tokens_per_gpu: int = number(ge=1, le=2**31)  # tokens of one micro-batch
    recompute: Recompute = MISSING
    max_nan_steps: int = number(ge=1, le=10**9)  # consecutive skipped steps after which the run stops
    logprob_chunk_tokens: int = number(ge=1, le=2**31)  # positions whose [tokens, vocab] fp32 logits exist at one time
    threads: int = number(ge=0, le=1024)  # CPU threads; 0: all


@dataclass
class SamplingConfig:
    temperature: float = number(ge=0, le=100)
    top_p: float = number(gt=0, le=1)
    top_k: int = number(ge=-1, le=2**22)  # -1: all
    max_response_tokens: int = number(ge=1, le=2**24)


@dataclass
class RolloutSamplingConfig(SamplingConfig):
    stop_token_ids: list[int] = numbers(ge=0, le=2**31 - 1)  # end a sample beside those that the checkpoint names


@dataclass
class RolloutConfig:
    _target_: str = MISSING
    name: str = MISSING
    sampling: RolloutSamplingConfig = field(default_factory=RolloutSamplingConfig)
    max_concurrency: int = number(ge=1, le=2**16)  # sequences decoded at one time, per engine
    request_timeout_seconds: float = number(gt=0, le=LONGEST_SECONDS)


@dataclass
class RouterReplayConfig:
    name: str = MISSING
    trainer: bool = MISSING  # replay recorded routes in every trainer pass
    rollout: bool = MISSING  # record routes in the engine


@dataclass
class SpeculativeConfig:
    name: str = MISSING
    method: Drafting = MISSING
    num_draft_tokens: int = number(ge=0, le=64)
    ngram_min: int = number(ge=1, le=1024)  # shortest suffix that is looked up
    ngram_max: int = number(ge=1, le=1024)
    draft_model: Optional[str] = path()  # a folder with a model of the same vocabulary
    online_training: bool = MISSING  # of the draft (MTP heads)
    auto_disable: bool = MISSING  # switch off, as a recorded decision, when slower than plain decoding
    auto_disable_after_steps: int = number(ge=1, le=10**9)  # engine steps of each kind that are measured first
    mtp_loss_coef: float = number(ge=0, le=1000)


@dataclass
class ConversationConfig:
    """How a sample comes about: one response to its prompt, or turns with an environment (docs/turns.md)."""

    _target_: Optional[str] = MISSING  # an async function rollout(engine, prompt, context); null: one response, no turns
    environment: Optional[str] = MISSING  # the class that runner.turns.drive takes turns with
    arguments: dict[str, Any] = field(default_factory=dict)  # of the environment, or what the function finds in its context
    max_turns: int = number(ge=1, le=10**6)  # of the model
    max_turn_tokens: Optional[int] = number(ge=1, le=2**24)  # of one turn of the model; null: what is left of the response
    max_observation_tokens: int = number(ge=1, le=2**24)  # a longer one is a flood, and ends its sample as failed
    observation_role: ObservationRole = MISSING  # none: an observation is plain text; else a message of the chat template
    max_images: int = number(ge=0, le=10**4)  # of one conversation, its prompt's included; one with more is failed
    min_image_pixels: int = number(
        ge=1, le=2**28
    )  # an environment's images are resized to whole tokens with so many pixels at least
    max_image_pixels: int = number(ge=1, le=2**28)  # and so many at most
    stop: list[str] = field(default_factory=list)  # texts that end a turn, beside the end tokens
    timeout_seconds: float = number(gt=0, le=LONGEST_SECONDS)  # of one conversation, generation included
    lockstep_seconds: float = number(ge=0, le=LONGEST_SECONDS)  # that an in-process engine waits for environments


@dataclass
class RewardConfig:
    """A part of the reward: a function or a service, or the weight of a part that the task or its environment gives."""

    weight: float = number(ge=-1e6, le=1e6, default=1.0)
    _target_: Optional[str] = None  # reward(prompt, text, sample) -> number, async or not, as package.module.name
    url: Optional[str] = None  # of a service (runner/tasks/service.py)
    key_variable: Optional[str] = None  # the environment variable with the service's key
    batch_size: int = number(ge=1, le=10**5, default=32)  # samples of one call of a service
    max_retries: int = number(ge=0, le=100, default=3)  # of such a call
    timeout_seconds: float = number(gt=0, le=LONGEST_SECONDS, default=60.0)  # of a call


@dataclass
class TaskConfig:
    _target_: str = MISSING
    name: str = MISSING
    train_path: Optional[str] = path()  # a data file, a folder or a hub id
    eval_path: Optional[str] = path()
    max_prompt_tokens: int = number(ge=1, le=2**24)
    reward_timeout_seconds: float = number(gt=0, le=LONGEST_SECONDS)
    seed: int = number(ge=0, le=2**32 - 1)  # of prompt order and generated problems; follows the run's seed
    rollout: ConversationConfig = field(default_factory=ConversationConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)  # by name: parts beside the task's own, which is `task`
    toy_twin: str = MISSING  # the made-up task that scale=laptop puts in this one's place


@dataclass
class CorrectionBounds:
    low: float = number(ge=0, le=1e6)
    high: float = number(gt=0, le=1e6)


@dataclass
class AlgorithmConfig:
    name: str = MISSING
    estimator: str = one_of(among=estimators)  # a file of runner/algorithms/estimators
    schedule: Schedule = MISSING  # runner/run/schedules.py
    max_staleness: int = number(ge=1, le=1000)  # async: steps that a rollout may be ahead of the step that is trained on
    samples_per_prompt: int = number(ge=1, le=2**16)
    prompts_per_step: int = number(ge=1, le=2**20)
    updates_per_rollout: int = number(ge=1, le=2**20)  # optimizer steps made from one rollout's samples
    turn_credit: TurnCredit = MISSING
    turn_discount: float = number(ge=0, le=1)  # of a reward, for each turn that it came later
    normalize_by_std: bool = MISSING  # GRPO divides advantages by the group's standard deviation
    clip_low: float = number(ge=0, le=1)
    clip_high: float = number(ge=0, le=1000)
    dual_clip: float = number(ge=0, le=1000)  # bounds the loss of a negative advantage at this ratio; 0: it does not
    loss_aggregation: LossAggregation = MISSING
    kl_coef: float = number(ge=0, le=1000)  # 0: no reference model
    kl_estimator: KlEstimator = MISSING
    entropy_coef: float = number(ge=0, le=1000)
    dynamic_sampling: bool = MISSING  # drop groups of equal reward and draw others
    max_resample_rounds: int = number(ge=0, le=1000)
    oversample_prompts: int = number(ge=0, le=2**20)  # prompts asked for at a time; 0: prompts_per_step
    correction: Correction = MISSING
    correction_low: float = number(ge=0, le=1e6)
    correction_high: float = number(gt=0, le=1e6)
    correction_bounds: dict[str, CorrectionBounds] = field(default_factory=dict)  # where those two are not given


@dataclass
class ClusterConfig:
    name: str = MISSING
    launcher: LauncherKind = MISSING
    plan_only: bool = MISSING  # a scheduler: `submit` writes a job for it, and `run` is what the job starts
    nodes: int = number(ge=1, le=2**17)
    gpus_per_node: int = number(ge=0, le=1024)  # 0: a machine without GPUs
    gpu_memory_gib: float = number(gt=0, le=1e6)
    host_memory_gib: float = number(gt=0, le=1e7)
    address: Optional[str] = MISSING
    interface: Optional[str] = MISSING  # a network interface or an IPv4 address, for servers and weight broadcasts
    insecure: bool = MISSING  # join a Ray cluster that asks for no token
    wait_seconds: float = number(ge=0, le=LONGEST_SECONDS)  # for nodes with room, at the start
    node_wait_seconds: float = number(ge=0, le=LONGEST_SECONDS)  # for a replacement of a node that was lost


@dataclass
class TrackingConfig:
    """What every tracker is told; the options' own keys stand in their rooms."""

    _target_: str = MISSING
    name: str = MISSING
    project: str = MISSING
    group: Optional[str] = MISSING  # a sweep's jobs are one
    tags: list[str] = field(default_factory=list)


@dataclass
class WarmStartConfig:
    """Supervised steps on worked solutions before RL, cached under outputs/ by what they depend on."""

    enabled: bool = MISSING
    max_steps: int = number(ge=1, le=10**6)
    batch_size: int = number(ge=1, le=2**16)
    lr: float = number(gt=0, le=10)
    stop_at_reward: float = number(ge=0, le=1)  # ends as soon as sampled success reaches this
    check_interval_steps: int = number(ge=1, le=10**9)
    cache: bool = MISSING


@dataclass
class EvalConfig:
    interval_steps: int = number(ge=0, le=10**9)  # 0: never
    num_prompts: int = number(ge=1, le=10**6)
    samples_per_prompt: int = number(ge=1, le=2**16)  # also the k of pass@k
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class CheckpointConfig:
    interval_steps: int = number(ge=0, le=10**9)  # 0: only at the end
    keep: int = number(ge=1, le=10**9)  # complete checkpoints that stay


@dataclass
class MismatchConfig:
    decompose_interval_steps: int = number(ge=0, le=10**9)  # 0: never
    decompose_samples: int = number(ge=0, le=10**6)
    probe_sequences: int = number(ge=0, le=10**6)  # fixed sequences scored on both sides after every weight sync
    residency_tensors: int = number(ge=0, le=10**9)  # tensors compared per sync with what is resident (all at the first)


@dataclass
class WatchRuleConfig:
    """Compare a metric with a bound or with its own running mean. A rule says what it asks for; the rest is off."""

    metric: str = MISSING
    patience_steps: int = number(ge=1, le=10**9)  # consecutive steps that must break the rule
    above: Optional[float] = number(ge=-1e30, le=1e30, default=None)
    below: Optional[float] = number(ge=-1e30, le=1e30, default=None)
    jump_ratio: Optional[float] = number(gt=0, le=1e30, default=None)  # value over its running mean; under 1: fires below it
    jump_floor: Optional[float] = number(ge=0, le=1e30, default=None)  # a jump to less than this is noise
    # absolute, against `baseline_run` at the same step
    drop_against_baseline: Optional[float] = number(ge=0, le=1e30, default=None)
    action: WatchAction = WatchAction.warn
    enabled: bool = True


@dataclass
class WatchConfig:
    baseline_run: Optional[str] = path()  # a run folder
    window_steps: int = number(ge=1, le=10**6)
    rules: dict[str, WatchRuleConfig] = field(default_factory=dict)


@dataclass
class ConvertConfig:
    source: Optional[str] = path()
    target: Optional[str] = path()
    method: ConvertMethod = MISSING
    format: Optional[str] = MISSING  # null: the precision's rollout format; else bf16, int8, fp8_channel, fp8_tensor
    workers: int = number(ge=1, le=1024)
    calibration: Optional[str] = path()  # for gptq: a data file or hub id; rows with text, question and answer, or messages
    calibration_samples: int = number(ge=1, le=10**7)
    calibration_tokens: int = number(ge=1, le=2**24)
    damping: float = number(gt=0, le=1e9)
    gptq_python: str = path()  # the Python of the environment with llmcompressor; relative to the repository


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
    scale: Scale = MISSING
    steps: int = number(ge=1, le=10**9)  # rollouts, each followed by algorithm.updates_per_rollout optimizer steps
    seed: int = number(ge=0, le=2**32 - 1)
    outputs_dir: str = path()
    run_name: Optional[str] = MISSING  # null: time and the groups that differ from the default
    resume: Optional[str] = path()  # a run folder or its name
