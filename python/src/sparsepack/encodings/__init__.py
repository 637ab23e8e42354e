"""Encodings of tensors, by the declaration that names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..dtypes import dtype_of
from ..errors import MalformedError
from .base import Component, Encoding, shape_of
from .bitmask import Bitmask
from .dense import Dense
from .nm import NM
from .sparse24 import Sparse24
from .torch_cutlass import TorchCutlass

__all__ = ["NM", "Bitmask", "Component", "Dense", "Encoding", "Sparse24", "TorchCutlass", "declared"]

_DECLARED: dict[str, Callable[[Mapping[str, Any]], Encoding]] = {
    "sparse24": Sparse24.declared,
    "nm": NM.declared,
    "bitmask": Bitmask.declared,
    "torch-cutlass": TorchCutlass.declared,
}


def declared(declaration: object, allow_dense: bool = False) -> Encoding:
    """The encoding that a declaration describes. Containers also declare ``dense`` tensors."""
    if not isinstance(declaration, Mapping) or "encoding" not in declaration:
        raise MalformedError("declaration is not an object with an encoding")
    encoding = declaration["encoding"]
    if encoding == "dense" and allow_dense:
        if set(declaration) != {"encoding", "dtype", "shape"}:
            raise MalformedError(f"declaration has keys {sorted(declaration)}")
        return Dense(dtype_of(declaration["dtype"]), shape_of(declaration["shape"]))
    if not isinstance(encoding, str) or encoding not in _DECLARED:
        raise MalformedError(f"unknown encoding {encoding!r}")
    return _DECLARED[encoding](declaration)
