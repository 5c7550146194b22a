"""`quantization_config` of a config.json: where it lies, and which module it says is in which format. Torch-free.

What a format's own entry looks like, its file in formats/ says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import regex

from runner.errors import UserError
from runner.precision import formats
from runner.precision.tensor_format import TensorFormat

MATCH_SECONDS = 20.0  # of one list of patterns on all modules; Kimi-K2's 70,000 take 0.1
_PATTERN_FIX = "write the module names out, or use plain patterns like re:.*lm_head"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second: compressed-tensors' older name


def nested_quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of a config.json, wherever it is nested; None for a bf16 checkpoint. UserError for one that is no
    object, and where two differ."""
    holders = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    found: list[Any] = []
    for holder in holders:
        for key in QUANTIZATION_KEYS:
            if holder.get(key) is not None and holder[key] not in found:
                found.append(holder[key])
    if not found:
        return None
    if len(found) > 1:
        raise UserError("config.json has two quantization_configs that differ", fix="leave the one that describes the weights")
    if not isinstance(found[0], dict):
        raise UserError("quantization_config of config.json is no object", fix="download config.json again")
    return found[0]


def without_quantization_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose `nested_quantization_config` is None."""

    def bare(holder: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in holder.items() if key not in QUANTIZATION_KEYS}

    return {
        key: bare(value) if key.endswith("_config") and isinstance(value, dict) else value for key, value in bare(config).items()
    }


def reader(config: Mapping[str, Any] | None) -> Callable[[str], TensorFormat]:
    """Module name -> format, as the program that wrote this quantization_config means it."""
    if config is None:
        return lambda module: TensorFormat.bf16()
    method = config.get("quant_method")
    try:
        if method == "compressed-tensors":
            return _compressed_tensors_reader(config)
        for spec in formats.all_formats():
            if method in spec.methods:
                return spec.config_reader(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # somebody else's JSON: any key may be of any type
        raise UserError(
            f"quantization_config cannot be understood ({type(error).__name__}: {str(error)[:100]})",
            fix="download config.json again, or convert the original bf16 checkpoint instead",
        ) from None
    known = [method for spec in formats.all_formats() for method in spec.methods]
    raise UserError(
        f"quantization_config.quant_method is {method!r:.80}; readable are {' and '.join(['compressed-tensors', *known])}",
        fix="convert the original bf16 checkpoint instead",
    )


def module_names(holder: Mapping[str, Any], key: str) -> list[str]:
    """A list of module names or patterns; absent and null count as empty."""
    found = holder.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise UserError(f"quantization_config: {key} is {found!r:.80}; it must be a list of names")
    return found


def _compressed_tensors_reader(config: Mapping[str, Any]) -> Callable[[str], TensorFormat]:
    _stored_as_they_are(config)
    ignored = _Matcher(module_names(config, "ignore"))
    schemes = [
        ("Linear" in targets, _Matcher(targets), _grid_of(scheme["weights"], scheme.get("format") or config.get("format")))
        for scheme in config["config_groups"].values()
        if (targets := module_names(scheme, "targets"))
    ]
    if not schemes:
        raise UserError("quantization_config: config_groups name no targets", fix="download config.json again")

    def format_of(module: str) -> TensorFormat:
        if not ignored(module):
            for every_linear, targeted, grid in schemes:
                if every_linear or targeted(module):
                    return grid
        return TensorFormat.bf16()

    return format_of


def _stored_as_they_are(config: Mapping[str, Any]) -> None:
    """UserError for weights that decoding alone does not bring back: rotated ones, and those that leave zeros out. Programs write
    both entries empty for weights that are neither."""
    transform, sparsity = config.get("transform_config") or {}, config.get("sparsity_config") or {}
    fix = "convert the original bf16 checkpoint instead"
    if transform.get("config_groups"):
        raise UserError("quantization_config: transform_config says that the weights are stored rotated", fix=fix)
    if (container := sparsity.get("format", "dense")) not in (None, "dense"):
        raise UserError(f"quantization_config: sparsity_config says that the weights are stored as {container!s:.40}", fix=fix)


class _Matcher:
    """compressed-tensors' matching: an exact module name, or `re:` and a pattern matched from the start.

    A pattern of somebody else's config.json may take for ever, so all matching together has MATCH_SECONDS.
    """

    def __init__(self, entries: list[str]) -> None:
        self.names = frozenset(entries)
        self.patterns: list[tuple[str, Any]] = []
        self.left = MATCH_SECONDS
        for entry in entries:
            if entry.startswith("re:"):
                try:
                    self.patterns.append((entry, regex.compile(entry[3:], cache_pattern=False)))
                except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                    problem = f"quantization_config: {entry!r:.80} is no pattern: {error!s:.80}"
                    raise UserError(problem, fix=_PATTERN_FIX) from None

    def __call__(self, module: str) -> bool:
        if module in self.names:
            return True
        for entry, pattern in self.patterns:
            started = time.process_time()
            try:
                if self.left > 0 and pattern.match(module, timeout=self.left):
                    return True
            except TimeoutError:
                self.left = 0.0
            self.left -= time.process_time() - started
            if self.left <= 0:
                raise UserError(f"quantization_config: matching {entry!r:.80} takes too long", fix=_PATTERN_FIX)
        return False


def _grid_of(weights: Mapping[str, Any] | None, container: str | None) -> TensorFormat:
    """A compressed-tensors `weights` entry as a TensorFormat; raises UserError for what cannot be read."""
    if weights is None:
        return TensorFormat.bf16()

    def value(key: str) -> Any:
        return weights.get(key)  # someone else's JSON: a key that is absent reads as null

    bits, group = value("num_bits"), value("group_size")
    # compressed-tensors' own reading of a strategy that is not there
    strategy = value("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy in ("group", "tensor_group") and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise UserError(f"quantization_config: group_size is {group!r:.80}; it must be a positive whole number")
    if value("actorder") not in (None, "static", "weight"):
        raise UserError(f"quantization_config: activation order {value('actorder')!r:.80} cannot be read")
    kind = value("type") or "int"
    scheme = formats.Scheme(kind, bits, strategy, group, container, weights)
    for spec in formats.all_formats():
        if (grid := spec.read_scheme(scheme)) is not None:
            return grid
    raise UserError(
        f"quantization_config: {kind!s:.20}{bits!s:.20} weights, strategy {strategy!s:.20}, group_size {group!s:.20}, "
        f"container {container!s:.40} cannot be read",
        fix="convert the original bf16 checkpoint instead",
    )
