"""n:m encoding ``nm``: ``n`` kept elements of each group of ``m`` columns, and a bit for each column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import bits_of
from ..errors import MalformedError
from .base import Component, count_of, declared_matrix, packable, row_blocks, unpack_bits


@dataclass(frozen=True)
class NM:
    """``.values`` ``[R, C/m*n]`` and ``.mask`` ``[R, ceil(C/8)]``."""

    dtype: torch.dtype
    shape: tuple[int, int]
    n: int
    m: int
    name: str = "nm"

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> NM:
        dtype, shape = declared_matrix(declaration, {"n", "m"})
        packable(dtype)
        m = count_of(declaration, "m", 2, 16)
        n = count_of(declaration, "n", 1, m - 1)
        if (n, m) == (2, 4):
            raise MalformedError("2:4 is declared as nm (expected sparse24)")
        if shape[1] % m:
            raise MalformedError(f"{shape[1]} columns are not whole groups of {m}")
        return cls(dtype, shape, n, m)

    def components(self) -> list[Component]:
        rows, columns = self.shape
        return [
            Component(".values", self.dtype, (rows, columns // self.m * self.n)),
            Component(".mask", torch.uint8, (rows, -(-columns // 8))),
        ]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return decode(parts[".values"], parts[".mask"], self.shape[1], self.n, self.m)


def decode(values: torch.Tensor, mask: torch.Tensor, columns: int, n: int, m: int) -> torch.Tensor:
    """``[R, C/m*n]`` values and ``[R, ceil(C/8)]`` mask bytes to ``[R, C]``."""
    rows = values.shape[0]
    bits = values.contiguous().view(bits_of(values.dtype))
    out = torch.zeros((rows, columns), dtype=bits.dtype, device=bits.device)
    for block in row_blocks(rows, columns):
        kept = unpack_bits(mask[block], columns, block.start)
        check_counts(kept, n, m, block.start)
        out[block].masked_scatter_(kept, bits[block])
    return out.view(values.dtype)


def check_counts(kept: torch.Tensor, n: int, m: int, first_row: int) -> None:
    """Refuses groups that do not keep exactly ``n``."""
    counts = kept.view(kept.shape[0], -1, m).sum(-1)
    if (counts != n).any():
        row, group = (int(index) for index in (counts != n).nonzero()[0])
        raise MalformedError(
            f"row {first_row + row}, group {group}: mask keeps {int(counts[row, group])} of {m} (expected {n})"
        )
