"""``quantization_config`` of config.json: which modules of a directory compressed-tensors has quantized, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .encodings.quantized import FLOAT, INT, PACK, Grid
from .errors import MalformedError

CLASS, EXPRESSION = "Linear", "re:"


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored."""

    format: str
    grid: Grid


@dataclass
class Schemes:
    """The scheme of each module: names come before expressions, and those before the class."""

    names: dict[str, Scheme] = field(default_factory=dict)
    expressions: dict[str, Scheme] = field(default_factory=dict)
    linear: Scheme | None = None
    ignored: list[str] = field(default_factory=list)

    def of(self, module: str) -> Scheme:
        """How a quantized module is stored."""
        for ignored in self.ignored:
            if ignored in (module, CLASS) or (ignored.startswith(EXPRESSION) and matches(ignored, module)):
                raise MalformedError("the module is quantized, but quantization_config.ignore lists it")
        if module in self.names:
            return self.names[module]
        for text in sorted(self.expressions):
            if matches(text, module):
                return self.expressions[text]
        if self.linear is None:
            raise MalformedError("no target of quantization_config.config_groups is for the module")
        return self.linear


def matches(target: str, module: str) -> bool:
    """Whether an ``re:`` target is for a module."""
    try:
        return re.match(target.removeprefix(EXPRESSION), module) is not None
    except re.error:
        raise MalformedError(f"quantization_config has the expression {target!r}, which is none") from None


def schemes(quantization: dict[str, Any]) -> Schemes:
    """What a ``quantization_config`` with ``config_groups`` says; everything that is not read is refused."""
    expect(quantization, "quantization_status", ("compressed",))
    for key in ("kv_cache_scheme", "transform_config"):
        if quantization.get(key):
            raise MalformedError(f"quantization_config.{key} is not supported")
    sparsity = quantization.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format") != "dense"):
        raise MalformedError("quantization_config has both config_groups and sparsity_config")
    groups, ignored = quantization["config_groups"], quantization.get("ignore") or []
    if not isinstance(groups, dict) or not strings(ignored):
        raise MalformedError("quantization_config.config_groups or ignore is malformed")
    found = Schemes(ignored=ignored)
    for name, group in groups.items():
        try:
            add(found, group, quantization.get("format"))
        except MalformedError as wrong:
            raise MalformedError(f"quantization_config.config_groups.{name}: {wrong}") from None
    return found


def add(found: Schemes, group: object, outer_format: object) -> None:
    """Takes in a group."""
    if not isinstance(group, dict) or not strings(group.get("targets")):
        raise MalformedError("not an object with targets")
    scheme = scheme_of(group, outer_format)
    for target in group["targets"]:
        if target in found.names or target in found.expressions or (target == CLASS and found.linear is not None):
            raise MalformedError(f"target {target!r} stands twice")
        if target == CLASS:
            found.linear = scheme
        else:
            (found.expressions if target.startswith(EXPRESSION) else found.names)[target] = scheme


def scheme_of(group: dict[str, Any], outer_format: object) -> Scheme:
    """Format and grid of a group."""
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise MalformedError(f"{key} is not supported")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise MalformedError("weights is not an object")
    kind = str(weights.get("type", "int")).lower()
    named = group.get("format") or outer_format
    formats = {"int": (PACK, INT, "naive-quantized"), "float": (FLOAT, "naive-quantized")}
    if kind not in formats or named not in formats[kind]:
        raise MalformedError(f"format is {named!r} for weights of type {kind}")
    if named == "naive-quantized":
        named = INT if kind == "int" else FLOAT
    bits, symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    if type(bits) is not int or not (2 if named == PACK else 8) <= bits <= 8 or type(symmetric) is not bool:
        raise MalformedError(f"weights of {bits!r} bits, symmetric {symmetric!r}")
    expect(weights, "dynamic", (None, False))
    expect(weights, "actorder", (None, False, "weight", "static"))
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy in ("group", None) and type(size) is int and size > 0:
        grid = Grid(bits, size, symmetric)
    elif (strategy == "channel" and size in (None, -1)) or (strategy is None and size == -1):
        grid = Grid(bits, None, symmetric)
    else:
        raise MalformedError(f"strategy is {strategy!r} with group_size {size!r} (expected channel or group)")
    if named == FLOAT and grid != Grid(8, None, True):
        raise MalformedError("floats in groups or with zero points")
    return Scheme(named, grid)


def expect(fields: dict[str, Any], key: str, expected: tuple[object, ...]) -> None:
    """Refuses another value than one of these."""
    value = fields.get(key)
    if not any(value is one or (isinstance(one, str) and value == one) for one in expected):
        raise MalformedError(f"{key} is {value!r} (expected {' or '.join(map(repr, expected))})")


def strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
