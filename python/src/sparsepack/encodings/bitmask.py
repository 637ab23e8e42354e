"""Bitmask encoding ``bitmask``: the kept elements of the matrix, a bit for each, and an offset every 64 rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..dtypes import bits_of
from ..errors import MalformedError
from .base import Component, count_of, declared_matrix, first, packable, row_blocks, unpack_bits

OFFSET_ROWS = 64


@dataclass(frozen=True)
class Bitmask:
    """``.values`` ``[kept]``, ``.mask`` ``[R, ceil(C/8)]`` and ``.offsets`` ``[ceil(R/64) + 1]``."""

    dtype: torch.dtype
    shape: tuple[int, int]
    kept: int
    name: str = "bitmask"

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> Bitmask:
        dtype, shape = declared_matrix(declaration, {"kept"})
        packable(dtype)
        return cls(dtype, shape, count_of(declaration, "kept", 0, shape[0] * shape[1]))

    def components(self) -> list[Component]:
        rows, columns = self.shape
        return [
            Component(".values", self.dtype, (self.kept,)),
            Component(".mask", torch.uint8, (rows, -(-columns // 8))),
            Component(".offsets", torch.uint64, (-(-rows // OFFSET_ROWS) + 1,)),
        ]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return decode(parts[".values"], parts[".mask"], parts[".offsets"], self.shape[1])


def decode(values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, columns: int) -> torch.Tensor:
    """Kept values, ``[R, ceil(C/8)]`` mask bytes and offsets (u64) to ``[R, C]``."""
    rows = mask.shape[0]
    bits = values.contiguous().view(bits_of(values.dtype))
    bounds = checked_offsets(offsets, values.shape[0])
    if bits[bounds[-1] :].any():
        raise MalformedError(f"values behind the last kept element, {bounds[-1]}, are not all zero")
    out = torch.zeros((rows, columns), dtype=bits.dtype, device=bits.device)
    for block in row_blocks(rows, columns, OFFSET_ROWS):
        kept = unpack_bits(mask[block], columns, block.start)
        stripes = bounds[block.start // OFFSET_ROWS : -(-block.stop // OFFSET_ROWS) + 1]
        check_counts(kept, stripes, block.start)
        out[block].masked_scatter_(kept, bits[stripes[0] : stripes[-1]])
    return out.view(values.dtype)


def checked_offsets(offsets: torch.Tensor, kept: int) -> list[int]:
    """The offsets as numbers: from 0 on, ascending, the last at most ``kept``."""
    bounds: list[int] = offsets.view(torch.int64).tolist()
    if bounds[0] != 0:
        raise MalformedError(f"first offset is {bounds[0]} (expected 0)")
    for stripe, (low, high) in enumerate(pairwise(bounds)):
        if not low <= high <= kept:
            raise MalformedError(f"offset {stripe + 1} is {high} (expected {low} to {kept})")
    return bounds


def check_counts(kept: torch.Tensor, bounds: list[int], first_row: int) -> None:
    """Refuses stripes of 64 rows whose mask bits are not as many as the offsets say."""
    rows = torch.nn.functional.pad(kept.sum(1), (0, -kept.shape[0] % OFFSET_ROWS))
    found = rows.view(-1, OFFSET_ROWS).sum(1)
    expected = torch.tensor(bounds, device=kept.device).diff()
    if (found != expected).any():
        stripe = first(found != expected)
        row = first_row + stripe * OFFSET_ROWS
        raise MalformedError(
            f"row {row} and the {OFFSET_ROWS - 1} after it: mask keeps {int(found[stripe])} elements "
            f"(expected {int(expected[stripe])} by the offsets)"
        )
