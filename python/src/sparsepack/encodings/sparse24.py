"""2:4 encoding ``sparse24``: two kept elements and one nibble for each group of four columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import bits_of
from ..errors import MalformedError
from .base import Component, declared_matrix, first, packable, row_blocks

PADDING = 0xE


@dataclass(frozen=True)
class Sparse24:
    """``.values`` ``[R, C/2]`` and ``.metadata`` ``[R, ceil(C/8)]``."""

    dtype: torch.dtype
    shape: tuple[int, int]
    name: str = "sparse24"

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> Sparse24:
        dtype, shape = declared_matrix(declaration, set())
        packable(dtype)
        if shape[1] % 4:
            raise MalformedError(f"{shape[1]} columns are not whole groups of 4")
        return cls(dtype, shape)

    def components(self) -> list[Component]:
        rows, columns = self.shape
        return [
            Component(".values", self.dtype, (rows, columns // 2)),
            Component(".metadata", torch.uint8, (rows, -(-columns // 8))),
        ]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return decode(parts[".values"], parts[".metadata"])


def decode(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """``[R, C/2]`` values and ``[R, ceil(C/8)]`` bytes of nibbles to ``[R, C]``."""
    rows, groups = values.shape[0], values.shape[1] // 2
    bits = values.contiguous().view(bits_of(values.dtype)).view(rows, groups, 2)
    out = torch.empty((rows, groups, 4), dtype=bits.dtype, device=bits.device)
    for block in row_blocks(rows, 4 * groups):
        place(nibbles(metadata[block], groups, block.start), bits[block], out[block])
    return out.view(rows, 4 * groups).view(values.dtype)


def place(nibble: torch.Tensor, bits: torch.Tensor, out: torch.Tensor) -> None:
    """Writes pairs ``[R, G, 2]`` to the columns their nibbles ``[R, G]`` name in ``out`` ``[R, G, 4]``."""
    zero = torch.zeros((), dtype=bits.dtype, device=bits.device)
    one, two = nibble & 3, nibble >> 2
    for column in range(4):
        second = torch.where(two == column, bits[..., 1], zero)
        out[..., column] = torch.where(one == column, bits[..., 0], second)


def nibbles(metadata: torch.Tensor, groups: int, first_row: int = 0) -> torch.Tensor:
    """The nibbles ``[R, groups]`` of rows of metadata, each checked."""
    nibble = torch.stack((metadata & 15, metadata >> 4), dim=-1).flatten(1)
    padding = nibble[:, groups:]
    if (padding != PADDING).any():
        row = first((padding != PADDING).any(1))
        raise MalformedError(
            f"row {first_row + row}: unused nibble is {int(padding[row, 0]):#x} (expected {PADDING:#x})"
        )
    nibble = nibble[:, :groups]
    check_order(nibble, first_row)
    return nibble


def check_order(nibble: torch.Tensor, first_row: int) -> None:
    """Refuses nibbles whose two columns do not ascend; the other six of sixteen are legal."""
    illegal = (nibble & 3) >= (nibble >> 2)
    if illegal.any():
        row, group = (int(index) for index in illegal.nonzero()[0])
        raise MalformedError(f"row {first_row + row}, group {group}: illegal nibble {int(nibble[row, group]):#x}")


def check(metadata: torch.Tensor, groups: int) -> None:
    """Refuses illegal nibbles and padding without decoding."""
    for block in row_blocks(metadata.shape[0], 4 * groups):
        nibbles(metadata[block], groups, block.start)
