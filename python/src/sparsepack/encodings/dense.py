"""A tensor stored as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import dtype_of
from ..errors import MalformedError
from .base import Component, shape_of


@dataclass(frozen=True)
class Dense:
    """One component, of the tensor's own name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str = "dense"

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> Dense:
        if set(declaration) != {"encoding", "dtype", "shape"}:
            raise MalformedError(f"declaration has keys {sorted(declaration)}")
        return cls(dtype_of(declaration["dtype"]), shape_of(declaration["shape"]))

    def components(self) -> list[Component]:
        return [Component("", self.dtype, self.shape)]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts[""]
