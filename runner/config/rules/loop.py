"""Rules of the loop: batches, sampling, router replay, speculation, optimizer, watch rules."""

from __future__ import annotations

from collections.abc import Iterator

from runner.algorithms.estimators import estimator_of, names
from runner.config.choices import Drafting, Schedule, TurnCredit
from runner.config.option import engine_layout, shares_gpus
from runner.config.rules.parallelism import positive
from runner.config.schema import Config, Correction
from runner.errors import UserError
from runner.models import FAMILIES


def sampling(cfg: Config) -> Iterator[UserError]:
    """A truncated distribution is not the policy's: its logprobs would be wrong in the importance ratio."""
    train = cfg.rollout.sampling
    if train.top_p != 1.0:
        yield UserError(
            f"training rollouts sample the whole distribution, not top_p {train.top_p}",
            key="rollout.sampling.top_p",
            fix="rollout.sampling.top_p=1.0 (evaluation.sampling.top_p is free)",
        )
    if train.top_k != -1:
        yield UserError(
            f"training rollouts sample the whole distribution, not top_k {train.top_k}",
            key="rollout.sampling.top_k",
            fix="rollout.sampling.top_k=-1 (evaluation.sampling.top_k is free)",
        )
    if cfg.evaluation.sampling.top_k == 0 or cfg.evaluation.sampling.top_k < -1:
        yield UserError(
            f"top_k {cfg.evaluation.sampling.top_k}", key="evaluation.sampling.top_k", fix="evaluation.sampling.top_k=-1"
        )


def batch_divides(cfg: Config) -> Iterator[UserError]:
    algorithm, par = cfg.algorithm, cfg.parallelism
    if not positive(cfg) or min(algorithm.updates_per_rollout, algorithm.samples_per_prompt, algorithm.prompts_per_step) < 1:
        return
    samples = algorithm.prompts_per_step * algorithm.samples_per_prompt
    text = f"{algorithm.prompts_per_step} prompts x {algorithm.samples_per_prompt} samples = {samples}"
    if samples % algorithm.updates_per_rollout:
        yield UserError(
            f"{text}, which does not divide into {algorithm.updates_per_rollout} updates",
            key="algorithm.updates_per_rollout",
            fix="a number of updates that divides the samples",
        )
        return
    update, ranks = samples // algorithm.updates_per_rollout, par.ranks // (par.tp * par.pp * par.cp)
    if ranks and update % ranks:
        yield UserError(
            f"{text} in {algorithm.updates_per_rollout} updates of {update}, which {ranks} data-parallel ranks do not divide",
            key="algorithm.prompts_per_step",
            fix=f"algorithm.prompts_per_step={-(-algorithm.prompts_per_step // ranks) * ranks}",
        )


def estimator(cfg: Config) -> Iterator[UserError]:
    algorithm = cfg.algorithm
    if estimator_of(algorithm.estimator).compares_group and algorithm.samples_per_prompt == 1:
        yield UserError(
            f"{algorithm.estimator} compares the samples of a prompt with each other, and there is one",
            key="algorithm.samples_per_prompt",
            fix="algorithm.samples_per_prompt=8, or algorithm=reinforce_pp",
        )
    if algorithm.dynamic_sampling and algorithm.samples_per_prompt == 1:
        yield UserError(
            "a group of one sample always has equal rewards, so dynamic sampling would drop everything",
            key="algorithm.dynamic_sampling",
            fix="algorithm.dynamic_sampling=false, or algorithm.samples_per_prompt=8",
        )
    if algorithm.oversample_prompts and algorithm.oversample_prompts < algorithm.prompts_per_step:
        yield UserError(
            f"{algorithm.oversample_prompts} is less than the {algorithm.prompts_per_step} prompts of a step",
            key="algorithm.oversample_prompts",
            fix=f"algorithm.oversample_prompts={2 * algorithm.prompts_per_step}, or 0",
        )
    if algorithm.oversample_prompts and not algorithm.dynamic_sampling and algorithm.schedule != Schedule["async"]:
        yield UserError(
            "without dynamic sampling nothing is dropped, so nothing more is asked for",
            key="algorithm.oversample_prompts",
            fix="algorithm.dynamic_sampling=true, algorithm.schedule=async (the surplus is aborted), or 0",
        )
    if algorithm.correction is not Correction.none and not algorithm.correction_low <= 1 <= algorithm.correction_high:
        yield UserError(
            f"the ratio 1 (no mismatch) lies outside [{algorithm.correction_low}, {algorithm.correction_high}]",
            key="algorithm.correction_high" if algorithm.correction_high < 1 else "algorithm.correction_low",
            fix="algorithm.correction_low=0.5 algorithm.correction_high=2.0",
        )


def schedule(cfg: Config) -> Iterator[UserError]:
    if cfg.algorithm.schedule == Schedule.sync:
        return
    if shares_gpus(cfg):
        yield UserError(
            f"{cfg.algorithm.schedule} generates while it trains, and trainer and engines take turns on the same GPUs",
            key="algorithm.schedule",
            fix="algorithm.schedule=sync, or parallelism.colocate=false with GPUs of their own for the engines",
        )
    if cfg.algorithm.schedule != Schedule["async"]:
        return
    if engine_layout(cfg).in_process:
        yield UserError(
            f"async changes weights while samples are generated, and rollout={cfg.rollout.name} generates in our own process",
            key="algorithm.schedule",
            fix="algorithm.schedule=one_step_off, or rollout=sglang",
        )
    if cfg.mismatch.decompose_interval_steps and cfg.rollout.sampling.temperature != 1.0:
        yield UserError(
            "async tells staleness from numerics by scores of the engines, which are at temperature 1, and samples have "
            f"temperature {cfg.rollout.sampling.temperature}",
            key="mismatch.decompose_interval_steps",
            fix="mismatch.decompose_interval_steps=0, or rollout.sampling.temperature=1.0",
        )


def dual_clip(cfg: Config) -> Iterator[UserError]:
    algorithm = cfg.algorithm
    if algorithm.dual_clip <= 0:
        return
    if not estimator_of(algorithm.estimator).dual_clip:
        owners = " and ".join(name for name in names() if estimator_of(name).dual_clip)
        yield UserError(
            f"{algorithm.estimator} has no second clip: it belongs to the token-level clip of {owners}",
            key="algorithm.dual_clip",
            fix="algorithm.dual_clip=0",
        )
    elif algorithm.dual_clip <= 1:
        yield UserError(
            f"at {algorithm.dual_clip} the tokens of a negative advantage have no gradient: their ratio starts at 1",
            key="algorithm.dual_clip",
            fix="algorithm.dual_clip=3.0, or 0",
        )


def context_holds(cfg: Config) -> Iterator[UserError]:
    limit, prompt = cfg.model.max_context_tokens, cfg.task.max_prompt_tokens
    for name, tokens in (
        ("rollout", cfg.rollout.sampling.max_response_tokens),
        ("evaluation", cfg.evaluation.sampling.max_response_tokens),
    ):
        if prompt + tokens > limit:
            yield UserError(
                f"prompts of {prompt} and responses of {tokens} tokens are longer than the context of {cfg.model.name}, {limit}",
                key=f"{name}.sampling.max_response_tokens",
                fix=f"{name}.sampling.max_response_tokens={limit - prompt}"
                if limit > prompt
                else f"task.max_prompt_tokens={limit // 2} {name}.sampling.max_response_tokens={limit - limit // 2}",
            )


def model_numbers(cfg: Config) -> Iterator[UserError]:
    model = cfg.model
    if model.num_experts and not 1 <= model.experts_top_k <= model.num_experts:
        yield UserError(
            f"{model.experts_top_k} of {model.num_experts} experts per token",
            key="model.experts_top_k",
            fix=f"model.experts_top_k={min(8, model.num_experts)}",
        )
    groups, chosen = model.expert_groups, model.expert_groups_top_k
    if not 1 <= chosen <= groups:
        yield UserError(
            f"{chosen} of {groups} groups of experts",
            key="model.expert_groups_top_k",
            fix=f"model.expert_groups_top_k={max(1, groups)}",
        )
    elif groups > 1 and (model.family not in FAMILIES or not FAMILIES[model.family].groups_experts):
        yield UserError(f"family {model.family} has no groups of experts", key="model.expert_groups", fix="model.expert_groups=1")
    elif groups > 1 and (model.num_experts % groups or model.num_experts < 2 * groups):
        yield UserError(
            f"{model.num_experts} experts do not make {groups} groups of 2 or more",
            key="model.expert_groups",
            fix="a divisor of half of model.num_experts",
        )
    elif model.experts_top_k > chosen * (model.num_experts // groups) and model.num_experts:
        yield UserError(
            f"{chosen} groups of {model.num_experts // groups} experts hold fewer than the {model.experts_top_k} of a token",
            key="model.expert_groups_top_k",
            fix=f"model.expert_groups_top_k={groups}",
        )
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield UserError(
            f"{model.num_heads} heads do not share {model.num_kv_heads} key/value heads evenly",
            key="model.num_kv_heads",
            fix="a divisor of model.num_heads",
        )
    if model.num_dense_layers > model.num_layers:
        yield UserError(
            f"{model.num_dense_layers} dense layers of {model.num_layers}",
            key="model.num_dense_layers",
            fix="model.num_dense_layers=0",
        )
    if model.hf_checkpoint is None and not cfg.warm_start.enabled and cfg.model.num_layers > 8:
        yield UserError(
            "random weights of this size learn nothing from rewards",
            key="model.hf_checkpoint",
            fix="model.hf_checkpoint=<a folder or hub id>",
        )


def router_replay(cfg: Config) -> Iterator[UserError]:
    replay = cfg.router_replay
    if replay.trainer != replay.rollout:
        on, off = ("trainer", "rollout") if replay.trainer else ("rollout", "trainer")
        yield UserError(
            f"router replay is on in the {on} and off in the {off}: both or neither",
            key=f"router_replay.{off}",
            fix="router_replay=r3 or router_replay=none",
        )
    if not (replay.trainer or replay.rollout):
        return
    if cfg.model.num_experts == 0:
        yield UserError(f"{cfg.model.name} is dense: it has no routes to replay", key="router_replay", fix="router_replay=none")


def speculation(cfg: Config) -> Iterator[UserError]:
    spec = cfg.speculative
    if spec.method != Drafting.none and spec.num_draft_tokens == 0:
        yield UserError(
            f"{spec.method} proposes 0 tokens", key="speculative.num_draft_tokens", fix="speculative.num_draft_tokens=4"
        )
    if spec.method == Drafting.ngram and spec.ngram_min > spec.ngram_max:
        yield UserError(
            f"the shortest suffix, {spec.ngram_min}, is longer than the longest, {spec.ngram_max}",
            key="speculative.ngram_min",
            fix=f"speculative.ngram_min={spec.ngram_max}",
        )
    if spec.method in (Drafting.draft, Drafting.eagle) and not spec.draft_model:
        yield UserError(
            f"{spec.method} needs a draft model", key="speculative.draft_model", fix="speculative.draft_model=<folder>"
        )
    if spec.method == Drafting.mtp and cfg.model.num_mtp_layers == 0:
        yield UserError(
            f"{cfg.model.name} has no multi-token-prediction layers",
            key="speculative.method",
            fix="speculative=ngram, or model=mimo_7b",
        )
    if spec.online_training and (spec.method != Drafting.mtp or cfg.model.num_mtp_layers == 0):
        yield UserError(
            f"only MTP heads are trained online, not {spec.method}",
            key="speculative.online_training",
            fix="speculative.online_training=false",
        )


def optimizer(cfg: Config) -> Iterator[UserError]:
    trainer = cfg.trainer
    for key in ("beta1", "beta2"):
        if getattr(trainer.optimizer, key) == 1.0:
            yield UserError("1.0 never forgets", key=f"trainer.optimizer.{key}", fix=f"trainer.optimizer.{key}=0.9")


def watch(cfg: Config) -> Iterator[UserError]:
    for name, rule in cfg.watch.rules.items():
        bounds = (rule.above, rule.below, rule.jump_ratio, rule.drop_against_baseline)
        if rule.enabled and all(bound is None for bound in bounds):
            yield UserError(
                "an enabled rule without a bound never fires",
                key=f"watch.rules.{name}",
                fix=f"watch.rules.{name}.above=<number>, below, jump_ratio or drop_against_baseline",
            )
        if rule.patience_steps < 1:
            yield UserError(
                f"{rule.patience_steps} steps",
                key=f"watch.rules.{name}.patience_steps",
                fix=f"watch.rules.{name}.patience_steps=1",
            )
    if cfg.mismatch.decompose_interval_steps and not cfg.mismatch.decompose_samples:
        yield UserError("0 samples to decompose", key="mismatch.decompose_samples", fix="mismatch.decompose_interval_steps=0")


def conversations(cfg: Config) -> Iterator[UserError]:
    section = cfg.task.rollout
    key = "task.rollout"
    if section._target_ == "runner.turns.drive" and not section.environment:
        fix = f"{key}.environment=package.module.Class, or another function in {key}._target_"
        yield UserError(
            "runner.turns.drive takes turns with an environment, and none is named", key=f"{key}.environment", fix=fix
        )
    if section._target_ is None and section.environment:
        problem = "an environment is named, and no function takes turns with it"
        yield UserError(problem, key=f"{key}._target_", fix=f"{key}._target_=runner.turns.drive")
    for name, path in (("_target_", section._target_), ("environment", section.environment)):
        if path is not None and not all(part.isidentifier() for part in f"{path}.".split(".")[:-1]) or (path and "." not in path):
            yield UserError(f"{path!r} is no package.module.name", key=f"{key}.{name}", fix=f"{key}.{name}=mymodule.name")
    if cfg.algorithm.turn_credit != TurnCredit.none and section._target_ is None:
        yield UserError(
            "a sample of one response has no turns to credit",
            key="algorithm.turn_credit",
            fix="algorithm.turn_credit=none, or a task of several turns",
        )
    if section.min_image_pixels > section.max_image_pixels:
        yield UserError(
            f"images of {section.min_image_pixels} to {section.max_image_pixels} pixels",
            key=f"{key}.min_image_pixels",
            fix=f"{key}.min_image_pixels={section.max_image_pixels}",
        )
    for name, part in cfg.task.rewards.items():
        if section._target_ is None and name != "task" and part._target_ is None and part.url is None:
            problem = f"nothing gives a part {name!r} of the reward: here is its weight alone, and the task's own part is `task`"
            yield UserError(
                problem, key=f"task.rewards.{name}", fix=f"+task.rewards.{name}._target_=package.module.name, or url=.."
            )
    if "" in section.stop:
        yield UserError("an empty text would end every turn", key=f"{key}.stop", fix=f"{key}.stop=[]")


RULES = (
    sampling,
    conversations,
    batch_divides,
    estimator,
    schedule,
    dual_clip,
    context_holds,
    model_numbers,
    router_replay,
    speculation,
    optimizer,
    watch,
)
