"""A tensor stored as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .base import Component


@dataclass(frozen=True)
class Dense:
    """One component, of the tensor's own name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str = "dense"

    def components(self) -> list[Component]:
        return [Component("", self.dtype, self.shape)]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts[""]
