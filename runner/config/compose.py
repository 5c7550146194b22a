"""From overrides to a checked config: Hydra composes, every problem is reported at once. Imports neither torch nor ray.

loaded = load(["model=qwen3_30b", "precision.group_size=64"])
loaded.config    the typed runner.config.schema.Config
loaded.raw       the same as a DictConfig, interpolations kept
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runner.config import limits, schema, searchpath
from runner.config import option as options
from runner.config.choices import Scale
from runner.config.diagnosis import Diagnosis, diagnose
from runner.config.overrides import (
    expand_home,
    given,
    is_unicode,
    joined_surrogates,
    override,
    override_key,
    readable,
    typed,
    with_newlines,
)
from runner.config.recorded import find_run, read_overrides
from runner.errors import UserError, UserErrors
from runner.redaction import remember_environment, restored

CONFIG_NAME = "config"
AUTO = "auto"  # model=auto: runner/models/auto.py
VERSION_BASE = "1.3"


@dataclass(frozen=True)
class Loaded:
    """A composed config. `overrides` are all that made it, those of a resumed run included."""

    config: schema.Config
    raw: DictConfig
    overrides: list[str]


def load(overrides: list[str], *, check_rules: bool = True) -> Loaded:
    """Compose, type-check and (unless `check_rules` is false) check the cross-group rules.

    Raises UserErrors with every problem: misspelt keys and options, wrong types, missing values, broken rules.
    """
    not_text = [item for item in overrides if not is_unicode(item)]
    if not_text:
        raise UserErrors(
            [
                UserError("the value is not UTF-8", key=override_key(ascii(item)), fix="type it in a terminal that writes UTF-8")
                for item in not_text
            ]
        )
    overrides = composed = readable(with_resumed(overrides))
    diagnosis: Diagnosis | None = None
    try:
        raw, composed = _with_twin(overrides)
        if OmegaConf.missing_keys(raw):
            raise OmegaConfBaseException("missing values")
        if any(item.startswith(("+", "~")) for item in overrides):  # Hydra lets these past the schema
            diagnosis = _diagnosed(composed, overrides)
            raw = diagnosis.raw if diagnosis.problems else raw
        config = to_config(raw)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        composed = composed if composed is not overrides else _with_checkpoint(overrides, None)
        diagnosis = _diagnosed(composed, overrides)
        # Hydra cannot add a key of an entry that is not there yet (+task.rewards.short.weight=1); the replay can.
        if not diagnosis.problems and not str(error).startswith("Error merging override +"):
            diagnosis.problems.append(UserError(str(error).strip()))
        raw = diagnosis.raw
        try:
            config = to_config(raw)
        except (OmegaConfBaseException, ValueError):  # mandatory values are missing: the rules cannot be asked
            raise UserErrors(diagnosis.problems) from None
    problems = list(diagnosis.problems) if diagnosis else []
    if check_rules:
        from runner.config import rules

        broken = rules.check(config)
        if broken:
            diagnosis = diagnosis or _diagnosed(composed, overrides)
            for problem in broken:
                problem.where = problem.where or diagnosis.source_of(problem.key)
            problems += broken
    if problems:
        raise UserErrors(problems)
    return Loaded(config, raw, overrides)


def load_config(overrides: list[str]) -> schema.Config:
    """`load(overrides).config`."""
    return load(overrides).config


def compose_raw(overrides: list[str]) -> DictConfig:
    """What Hydra makes of the overrides, with scale=laptop of the model's toy twin; raises Hydra's and OmegaConf's own errors."""
    return _with_twin(overrides)[0]


def _with_twin(overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """(what Hydra makes of the overrides, those overrides); with scale=laptop of those that put the `toy_twin`s of model and task
    in their places, in the run that the model itself chose. A task that the command line names stays."""
    raw = _composed(overrides)
    if raw.hydra.runtime.choices.model == AUTO:
        if raw.scale == Scale.laptop:
            error = UserError("model=auto has no toy twin", key="scale", fix="scale=full, or a tiny model: model=tiny_moe")
            raise UserErrors([error])
        overrides = _with_checkpoint(overrides, raw.model)
        raw = _composed(overrides)
    elif raw.scale == Scale.laptop:
        twins = []
        if raw.task.toy_twin != raw.task.name and "task" not in map(override_key, overrides):
            twins.append(f"task={raw.task.toy_twin}")
        if raw.model.toy_twin != raw.model.name:
            overrides = [item for item in overrides if override_key(item) not in ("model", "run")]
            twins += [f"model={raw.model.toy_twin}", f"run={raw.hydra.runtime.choices.run}"]
        if twins:
            overrides = [*overrides, *twins]
            raw = _composed(overrides)
    else:
        _take_architecture(raw.model, overrides)
    with open_dict(raw):
        del raw["hydra"]
    return raw, overrides


def _with_checkpoint(overrides: list[str], model: DictConfig | None) -> list[str]:
    """model=auto: what the config.json of the checkpoint says of the model, and no router replay where it has no routers, before
    the overrides. `model`: the group as it was composed; None where that failed, and the command line alone is known.

    What is typed stays, and the rules say where it differs. UserErrors: nothing could be read.
    """
    from runner.models import auto

    if model is None and given(overrides, "model") != AUTO:
        return overrides
    try:
        fields = auto.architecture(given(overrides, "model.hf_checkpoint") if model is None else model.hf_checkpoint)
    except UserError as error:
        raise UserErrors([error]) from None
    if model is not None and model.max_context_tokens > 1:  # a recipe chose it
        del fields["max_context_tokens"]
    read = {f"model.{name}": value for name, value in fields.items()}
    if not fields["num_experts"]:
        read["router_replay"] = "none"
    own = {override_key(item) for item in overrides}
    return [*(_override(key, value) for key, value in read.items() if key not in own), *overrides]


def _override(key: str, value: object) -> str:
    return override(key, value) if isinstance(value, str) else f"{key}={str(value).lower()}"


def _take_architecture(model: DictConfig, overrides: list[str]) -> None:
    """Put the numbers of a local checkpoint's config.json into the model group. A key that the command line names stays as it is,
    and the rules say where it differs; they also say what in the file nobody here computes. A hub id is read when the run starts:
    its numbers must be those of the model group."""
    if model.hf_checkpoint is None:
        return
    from runner.models import FAMILIES, agreement

    typed_model = cast(schema.ModelConfig, model)
    family, config = FAMILIES.get(model.family), agreement.local_config(typed_model)
    if family is None or config is None:
        return
    try:
        numbers = agreement.numbers(typed_model, family, config)
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    typed = {override_key(item) for item in overrides}
    for name, value in numbers.items():
        if f"model.{name}" not in typed:
            model[name] = value


def _composed(overrides: list[str]) -> DictConfig:
    register()
    with initialize_config_dir(str(searchpath.CONFIG_DIR), version_base=VERSION_BASE):
        return compose(CONFIG_NAME, overrides=overrides, return_hydra_config=True)


def to_config(raw: DictConfig) -> schema.Config:
    """The typed config, as the program uses it. Raises OmegaConf's errors for missing and unresolvable values."""
    config = cast(schema.Config, OmegaConf.to_object(raw))
    remember_environment(raw)
    for _, holder, field in limits.walk(config):
        value = getattr(holder, field.name)
        if isinstance(value, str) and field.metadata.get(limits.PATH):
            setattr(holder, field.name, expand_home(value))
        if isinstance(value, str) and field.metadata.get(limits.LINES):
            setattr(holder, field.name, with_newlines(value))
    return config


def hydra_settings(overrides: list[str]) -> DictConfig:
    """The `hydra` node of the composition: sweep mode and parameters, which a recipe may set."""
    return cast(DictConfig, _composed(overrides).hydra)


def diagnosed(overrides: list[str]) -> Diagnosis:
    """Every problem of the overrides and of the YAML files they select, found by replaying the composition key by key."""
    register()
    with initialize_config_dir(str(searchpath.CONFIG_DIR), version_base=VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return diagnose(hydra.config_loader, CONFIG_NAME, overrides)


def _diagnosed(composed: list[str], overrides: list[str]) -> Diagnosis:
    """Of what `overrides` became: what was put before them was read in a checkpoint."""
    found, before = diagnosed(composed), len(composed) - len(overrides)
    for item in composed[:before] if composed[before:] == overrides else ():
        found.sources[override_key(item)] = "config.json of the checkpoint"
    return found


def with_resumed(overrides: list[str]) -> list[str]:
    """With `resume=<run>` among them: that run's own overrides first; a new override replaces an old one of the same key."""
    target = given(overrides, "resume")
    if not target:
        return overrides
    outputs_dir = given(overrides, "outputs_dir") or default_outputs_dir()
    run = find_run(expand_home(target), expand_home(outputs_dir))
    if (name := given(overrides, "run_name")) and run.absolute().parts[-name.count("/") - 1 :] != tuple(name.split("/")):
        raise UserError(
            f"a resumed run goes on in its own folder, {run}, which has another name than {name!r}",
            key="run_name",
            fix=f"leave run_name away; without {typed('resume', target)} a new run begins",
        )
    kept = restored([joined_surrogates(item) for item in read_overrides(run) if not _replaced(item, overrides)])
    return [*kept, *(item for item in overrides if override_key(item) != "resume"), override("resume", str(run))]


def _replaced(old: str, overrides: list[str]) -> bool:
    """Whether one of the overrides stands in the place of a recorded one. An entry that `+` made stays, to be changed or removed;
    one that `~` removed may be added again."""
    key = override_key(old)
    if old.startswith("~"):
        return any(f"{override_key(item)}.".startswith(f"{key}.") for item in overrides)
    same = [item for item in overrides if override_key(item) == key and not item.startswith("~")]
    return any(item.startswith("+") or not old.startswith("+") for item in same)


def default_outputs_dir() -> str:
    """`outputs_dir` of conf/config.yaml, read without composing anything."""
    return str(cast(DictConfig, OmegaConf.load(searchpath.CONFIG_DIR / f"{CONFIG_NAME}.yaml")).outputs_dir)


def register() -> None:
    """Put the schemas into Hydra's store and the resolvers that conf/ uses into OmegaConf. Safe to call again.

    An option with keys of its own puts its schema first in its defaults list, as `<name>_schema`.
    """
    searchpath.register()
    store = ConfigStore.instance()
    for choice in options.choices():
        if f"{choice.name}_schema.yaml" not in store.repo.get(choice.group, {}):
            store.store(group=choice.group, name=f"{choice.name}_schema", node=choice.option.schema)
    if "schema.yaml" in store.repo:
        return
    store.store(name="schema", node=schema.Config)
    OmegaConf.register_new_resolver("gpus_needed", _gpus_needed, replace=True)
    OmegaConf.register_new_resolver("nodes_needed", _nodes_needed, replace=True)
    OmegaConf.register_new_resolver("at_least_one", lambda number: max(1, int(number)), replace=True)
    OmegaConf.register_new_resolver("above_one", lambda number: int(number) > 1, replace=True)


def _gpus_needed(parallelism: DictConfig) -> int:
    """GPUs that trainer and engines share, or the sum where each has its own."""
    trainer, rollout = int(parallelism.gpus), int(parallelism.rollout_gpus)
    return max(trainer, rollout) if parallelism.colocate else trainer + rollout


def _nodes_needed(parallelism: DictConfig, gpus_per_node: int) -> int:
    return max(1, -(-_gpus_needed(parallelism) // max(1, int(gpus_per_node))))


def to_yaml(raw: DictConfig, *, resolve: bool, package: str | None = None) -> str:
    """YAML of the config, or of one part of it. Raises UserError for a part that is not there."""
    node = OmegaConf.select(raw, package) if package else raw
    if node is None:
        raise UserError(f"the config has no part {package!r}", fix=f"one of: {', '.join(str(name) for name in raw)}")
    return OmegaConf.to_yaml(node, resolve=resolve) if OmegaConf.is_config(node) else f"{node}\n"
