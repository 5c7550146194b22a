"""Find every problem of a composition at once, by replaying it key by key, and know where each value came from.

Hydra stops at the first error and names neither the nearest key nor the line. This module is only asked when something is
wrong: the good path is Hydra's alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from runner.config import limits, searchpath
from runner.config import option as options
from runner.config.overrides import command, shell, typed
from runner.config.schema import Config
from runner.errors import UserError

COMMAND_LINE = "the command line"
REMOVED = {
    "model.trust_remote_code": "leave it out: code of a checkpoint is never run; what only it can read is refused",
    "task.max_turns": "task.rollout.max_turns=<n>, beside task.rollout._target_ (docs/turns.md)",
}


@dataclass
class Diagnosis:
    """`raw`: what is left of the config when everything wrong is taken out. `sources`: key -> file:line or command line."""

    raw: DictConfig
    problems: list[UserError] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def source_of(self, key: str | None) -> str | None:
        """Where the value of a key was last set; for a group, what chose its option. Follows no interpolation."""
        return self.sources.get(key) if key else None


MEANT = {"gpu": "cuda", "bf16": "bfloat16", "fp32": "float32", "off": "none"}  # what is no misspelling of it


def nearest(word: str, known: list[str]) -> str | None:
    """The known word that was most likely meant, or None."""
    if MEANT.get(word) in known:
        return MEANT[word]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    tail = word.rpartition(".")[2]
    by_tail = [key for key in known if key.rpartition(".")[2] == tail]  # right name, wrong or no group
    return by_tail[0] if len(by_tail) == 1 else None


def diagnose(loader: Any, config_name: str, overrides: list[str]) -> Diagnosis:
    """Replay the composition. `loader` is Hydra's config loader, which still decides what the defaults list is."""
    options = searchpath.groups()
    result = Diagnosis(OmegaConf.structured(Config))
    parsed = list(_parse(overrides, result.problems))
    chosen = [item for item in parsed if _is_choice(item, options)]
    good_choices = [item.input_line for item in chosen if _valid_choice(item, options, result.problems)]
    try:
        defaults = loader.compute_defaults_list(config_name, good_choices, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException) as error:
        result.problems.append(UserError(str(error).strip(), where=_file_of(error)))
        return result
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{searchpath.shown(Path(mark.name))}:{mark.line + 1}" if mark else None
        result.problems.append(UserError(f"not YAML: {error.problem}", where=where, fix="mend the file"))
        return result
    for item in chosen:
        result.sources[item.key_or_group] = COMMAND_LINE
    _replay_files(defaults, result)
    for item in parsed:
        if item not in chosen and not item.key_or_group.startswith("hydra"):
            _replay_override(item, options, result)
    result.problems += [UserError("has no value", key=key, fix=f"{key}=<value>") for key in missing_keys(result.raw)]
    result.problems += list(_unresolvable(result))
    return result


def _parse(overrides: list[str], problems: list[UserError]) -> Iterator[Override]:
    parser = OverridesParser.create()
    for text in overrides:
        try:
            item = parser.parse_override(text)
        except (HydraException, ValueError):  # of Python's own: an integer of thousands of digits
            bare = text.lstrip("-")
            name, equals, value = text.partition("=")
            fix = f"as a text, quoted for the shell: {shell(typed(name, value))}" if equals else f"{bare}=<value>"
            if equals and any(character.isspace() for character in name):
                fix = f"a key has no blanks: {''.join(name.split())}={value}"
            problems.append(UserError(f"cannot read {text!r} as key=value", key=bare.partition("=")[0] or text, fix=fix))
            continue
        if item.is_sweep_override():
            fix = command("-m", text)
            if limits.is_text(options.typed_keys().get(item.key_or_group)):
                fix += f", or as one text {shell(typed(item.key_or_group, item.get_value_string()))}"
            problems.append(
                UserError(
                    f"{text!r} holds several values, which only a sweep can run",
                    key=item.key_or_group,
                    where=COMMAND_LINE,
                    fix=fix,
                )
            )
            continue
        yield item


def _is_choice(item: Override, options: dict[str, list[str]]) -> bool:
    return item.key_or_group in options or item.key_or_group.partition("/")[0] == "hydra"


def _valid_choice(item: Override, options: dict[str, list[str]], problems: list[UserError]) -> bool:
    group, value = item.key_or_group, item.value()
    if group not in options or value in options[group]:
        return True
    known = options[group]
    if value in (None, False, "off", "no", "null"):
        fix = f"{group}=none" if "none" in known else f"{group}={known[0]}"
    else:
        close = nearest(str(value), known)
        fix = f"{group}={close}" if close else f"one of: {', '.join(known)}"
    listed = "" if fix.startswith("one of") else f"; its options are {', '.join(known)}"
    problems.append(UserError(f"group {group} has no option {_shown(value)}{listed}", key=group, where=COMMAND_LINE, fix=fix))
    return False


def _replay_files(defaults: Any, result: Diagnosis) -> None:
    store = ConfigStore.instance()
    for default in defaults:
        path, package = default.config_path, default.package or ""
        if path is None or path.startswith("hydra") or path == "_dummy_empty_config_":
            continue
        if file := searchpath.file_of(path):
            _replay_file(file, package, result)
        elif path != "schema":
            node = store.load(f"{path}.yaml").node
            result.raw = OmegaConf.merge(result.raw, {package: node})  # type: ignore[assignment]
            OmegaConf.set_struct(result.raw, True)


def _replay_file(file: Path, package: str, result: Diagnosis) -> None:
    shown = searchpath.shown(file)
    text = file.read_text()
    if text.lstrip().startswith("# @package _global_"):
        package = ""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown}:{mark.line + 1}" if mark else shown
        result.problems.append(UserError(f"not YAML: {getattr(error, 'problem', error)}", key=shown, where=where))
        return
    if root is None:
        return
    values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    for path, line in _leaves(root, ()):
        if path[0] in ("defaults", "hydra"):
            continue
        key = ".".join((package, *path) if package else path)
        where = f"{shown}:{line}"
        value: Any = values
        for part in path:
            value = value[part]
        if _set(key, value, where, result):
            result.sources[key] = where


def _leaves(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """(key path, line) of everything that is not a non-empty mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from _leaves(value, here)
            else:
                yield here, key.start_mark.line + 1


def _replay_override(item: Override, options: dict[str, list[str]], result: Diagnosis) -> None:
    key = item.key_or_group
    if item.type == OverrideType.DEL:
        if problem := _remove(key, item, result):
            result.problems.append(problem)
        return
    if _set(key, item.value(), COMMAND_LINE, result, add=item.is_add(), choices=options):
        result.sources[key] = COMMAND_LINE


def _remove(key: str, item: Override, result: Diagnosis) -> UserError | None:
    """Take an entry out of a free dictionary (task.mix, watch.rules); the problem where there is no such entry."""
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(result.raw, parent_key) if parent_key else result.raw
    if not OmegaConf.is_dict(parent) or OmegaConf.get_type(parent) is not dict:
        problem = f"{item.input_line}: a key of the schema cannot be removed"
        return UserError(problem, key=key, where=COMMAND_LINE, fix=f"{key}=null")
    if name not in list(parent):
        there = ", ".join(map(str, parent)) or "nothing"
        return UserError(f"{parent_key} has no entry {name!r}", key=key, where=COMMAND_LINE, fix=f"there is: {there}")
    with open_dict(parent):
        del parent[name]
    return None


def _set(
    key: str, value: Any, where: str, result: Diagnosis, *, add: bool = True, choices: dict[str, list[str]] | None = None
) -> bool:
    """Set one key; on failure add the problem and return False."""
    problem = _unknown(key, value, where, result, add, choices or {})
    if problem is None:
        try:
            OmegaConf.update(result.raw, key, value, merge=True, force_add=True)
            return True
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            problem = _wrong_type(key, value, where, result.raw, error)
    result.problems.append(problem)
    return False


def _unknown(key: str, value: Any, where: str, result: Diagnosis, add: bool, choices: dict[str, list[str]]) -> UserError | None:
    """None for a key that the schema has (an entry of a free dictionary is made), else the problem with the nearest key."""
    node: Any = result.raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not OmegaConf.is_dict(node):
            break
        if part not in list(node):
            if OmegaConf.get_type(node) is not dict:
                break
            if not add:  # watch.rules, rollout.server_args
                parent = ".".join(parts[:depth])
                fix = f"to add it, {_typed(f'+{key}', value)}"
                return UserError(f"{parent} has no entry {part!r}", key=key, where=where, fix=fix)
            if not is_dataclass(node._metadata.element_type):
                return None
            with open_dict(node):
                node[part] = OmegaConf.structured(node._metadata.element_type)
        node = node._get_node(part)
    else:
        return None
    if key in REMOVED:
        return UserError("no longer a key", key=key, where=where, fix=REMOVED[key])
    known = [*all_keys(result.raw), *(choices if "." not in key else ())]
    close = nearest(key, known)
    if where == COMMAND_LINE:
        fix = f"did you mean {_typed(close, value)}?" if close else "python -m runner --cfg job lists every key"
    else:
        fix = f"did you mean {close}?" if close else "runner/config/schema.py lists every key"
    return UserError("no such key", key=key, where=where, fix=fix)


def _wrong_type(key: str, value: Any, where: str, raw: DictConfig, error: Exception) -> UserError:
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(raw, parent_key) if parent_key else raw
    metadata = getattr(parent._get_node(name), "_metadata", None) if parent is not None else None
    expected = metadata.ref_type if metadata is not None else None
    if is_dataclass(expected):
        problem, fix = f"{_shown(value)} is one value, and this is a group of keys", f"{key}.{fields(expected)[0].name}=<value>"
    elif get_origin(expected) is dict:
        problem, fix = f"{_shown(value)} is one value, and this is a group of named ones", f"+{key}.<name>=<value>"
    elif get_origin(expected) is list:
        problem, fix = _no_list(key, value, get_args(expected)[0])
    elif isinstance(expected, type):
        problem, fix = _misfit(value, expected, lambda right: f"{key}={right}")
    else:
        problem = f"{_shown(value)} does not fit: {str(error).splitlines()[0]}"
        fix = "python -m runner --cfg job shows what it holds"
    return UserError(problem, key=key, where=where, fix=fix)


def _misfit(value: Any, expected: type, typed: Callable[[str], str]) -> tuple[str, str]:
    """What is wrong with a value of the wrong type, and what to do; `typed` is the override with another text in its place."""
    if issubclass(expected, Enum):
        choices = [member.name for member in expected]
        close = nearest(str(value), choices)
        return f"{_shown(value)} is none of {', '.join(choices)}", typed(close) if close else f"one of: {', '.join(choices)}"
    wanted = f"give it {_type_name(expected)}"
    return ("may not be null" if value is None else f"{_shown(value)} is not {_type_name(expected)}"), wanted


def _no_list(key: str, value: Any, element: type) -> tuple[str, str]:
    if value is None:
        return "may not be null", f"{key}=[]"
    if not isinstance(value, list):
        return f"{_shown(value)} is one value, and this is a list", shell(f"{key}=[{_shown(value)}]")
    place = next((i for i, item in enumerate(value) if not _fits(item, element)), None)
    if place is None:
        return f"{_shown(value)} does not fit", "python -m runner --cfg job shows what it holds"

    def typed(right: str) -> str:
        return shell(f"{key}=[{','.join([*map(_shown, value[:place]), right, *map(_shown, value[place + 1 :])])}]")

    return _misfit(value[place], element, typed)


def _fits(item: Any, element: type) -> bool:
    try:
        ListConfig([item], element_type=element)
    except OmegaConfBaseException:
        return False
    return True


def _type_name(expected: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(expected, f"a {getattr(expected, '__name__', expected)}")


def missing_keys(raw: DictConfig) -> list[str]:
    """Keys without a value. Unlike OmegaConf.missing_keys it does not stop at an interpolation that leads to one."""
    missing = []
    for key in all_keys(raw):
        parent_key, _, name = key.rpartition(".")
        parent = OmegaConf.select(raw, parent_key) if parent_key else raw
        if parent is not None and OmegaConf.is_missing(parent, name):
            missing.append(key)
    return missing


def _unresolvable(result: Diagnosis) -> Iterator[UserError]:
    """Interpolations that point nowhere or resolve to the wrong type."""
    for key in all_keys(result.raw):
        parent_key, _, name = key.rpartition(".")
        parent = OmegaConf.select(result.raw, parent_key) if parent_key else result.raw
        if parent is None or not OmegaConf.is_interpolation(parent, name):
            continue
        try:
            parent[name]
        except InterpolationToMissingValueError:  # the missing value itself is reported
            continue
        except OmegaConfBaseException as error:
            text = OmegaConf.to_container(parent, resolve=False)[name]  # type: ignore[call-overload,index]
            where = result.sources.get(key)
            yield UserError(
                f"{text} cannot be resolved: {str(error).splitlines()[0]}",
                key=key,
                where=where,
                fix="name a key or an environment variable that there is, or give the value itself",
            )


def all_keys(raw: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the config, groups included."""
    keys = []
    for name in list(raw):
        key = f"{prefix}{name}"
        keys.append(key)
        node = raw._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing() and not node._is_interpolation():
            keys += all_keys(node, f"{key}.")
    return keys


def _file_of(error: Exception) -> str | None:
    text = str(error)
    file = searchpath.file_of(text[4:].partition("'")[0]) if text.startswith("In '") else None
    return searchpath.shown(file) if file else None


def _typed(key: str, value: Any) -> str:
    """`key=value` quoted for the shell."""
    if isinstance(value, dict):
        return f"{key}=..."
    return shell(typed(key, value) if isinstance(value, str) else f"{key}={_shown(value)}")


def _shown(value: Any) -> str:
    """A value as a user types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) or "''"
