"""Encodings of tensors, by the declaration that names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..errors import MalformedError
from . import compressed_tensors, quantized
from .base import Component, Encoding
from .bitmask import Bitmask
from .dense import Dense
from .nm import NM
from .quantized import Int, Quantized
from .sparse24 import Sparse24
from .torch_cutlass import TorchCutlass

__all__ = [
    "NM",
    "Bitmask",
    "Component",
    "Dense",
    "Encoding",
    "Int",
    "Quantized",
    "Sparse24",
    "TorchCutlass",
    "declared",
]

_DECLARED: dict[str, Callable[[Mapping[str, Any]], Encoding]] = {
    "sparse24": Sparse24.declared,
    "nm": NM.declared,
    "bitmask": Bitmask.declared,
    "torch-cutlass": TorchCutlass.declared,
    "int": Int.declared,
}

# Safetensors directories tell these by config.json.
_DECLARED_IN_CONTAINERS: dict[str, Callable[[Mapping[str, Any]], Encoding]] = {
    "dense": Dense.declared,
    compressed_tensors.DECLARED_24: compressed_tensors.Sparse24Bitmask.declared,
    compressed_tensors.DECLARED: compressed_tensors.SparseBitmask.declared,
    "ct-pack-quantized": partial(Quantized.declared, quantized.PACK),
    "ct-int-quantized": partial(Quantized.declared, quantized.INT),
    "ct-float-quantized": partial(Quantized.declared, quantized.FLOAT),
}


def declared(declaration: object, in_container: bool = False) -> Encoding:
    """The encoding that a declaration describes. Containers declare every tensor, others packed ones."""
    if not isinstance(declaration, Mapping) or "encoding" not in declaration:
        raise MalformedError("declaration is not an object with an encoding")
    encoding = declaration["encoding"]
    known = _DECLARED | _DECLARED_IN_CONTAINERS if in_container else _DECLARED
    if not isinstance(encoding, str) or encoding not in known:
        raise MalformedError(f"unknown encoding {encoding!r}")
    return known[encoding](declaration)
