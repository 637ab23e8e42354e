"""PyTorch's 2:4 encoding ``torch-cutlass``: the attributes of ``SparseSemiStructuredTensorCUTLASS``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import NAMES, bits_of
from ..errors import MalformedError
from .base import Component, declared_matrix, row_blocks
from .sparse24 import check_order, place


@dataclass(frozen=True)
class Layout:
    """Limits and metadata words of an element width."""

    row_multiple: int
    column_multiple: int
    word: torch.dtype
    groups_per_word: int
    rows_per_tile: int
    interweave: int


LAYOUTS = {
    torch.float16: Layout(32, 64, torch.int16, 4, 32, 4),
    torch.bfloat16: Layout(32, 64, torch.int16, 4, 32, 4),
    torch.int8: Layout(16, 128, torch.int32, 8, 16, 2),
}


def problem(dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    """Why a matrix cannot have this layout, or nothing."""
    layout = LAYOUTS.get(dtype)
    if layout is None:
        return f"{NAMES.get(dtype, dtype)} has no CUTLASS layout (F16, BF16 and I8 have)"
    rows, columns = shape
    if rows == 0 or columns == 0 or rows % layout.row_multiple or columns % layout.column_multiple:
        return (
            f"shape [{rows}, {columns}] is not in multiples of [{layout.row_multiple}, "
            f"{layout.column_multiple}], which the CUTLASS layout needs"
        )
    return None


@dataclass(frozen=True)
class TorchCutlass:
    """``.packed`` ``[R, C/2]`` and ``.meta`` ``[R, C/16]`` (I16), or ``[R, C/32]`` (I32) for I8."""

    dtype: torch.dtype
    shape: tuple[int, int]
    name: str = "torch-cutlass"

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> TorchCutlass:
        dtype, shape = declared_matrix(declaration, set())
        if wrong := problem(dtype, shape):
            raise MalformedError(wrong)
        return cls(dtype, shape)

    def components(self) -> list[Component]:
        rows, columns = self.shape
        layout = LAYOUTS[self.dtype]
        return [
            Component(".packed", self.dtype, (rows, columns // 2)),
            Component(".meta", layout.word, (rows, columns // (4 * layout.groups_per_word))),
        ]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return decode(parts[".packed"], parts[".meta"])


def decode(packed: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """``packed`` ``[R, C/2]`` and reordered ``meta`` to ``[R, C]``."""
    layout = LAYOUTS[packed.dtype]
    rows, groups = packed.shape[0], packed.shape[1] // 2
    words = meta.contiguous().view(-1)
    bits = packed.contiguous().view(bits_of(packed.dtype)).view(rows, groups, 2)
    out = torch.empty((rows, groups, 4), dtype=bits.dtype, device=bits.device)
    for block in row_blocks(rows, 4 * groups):
        nibble = word_nibbles(words[places(block, rows, meta.shape[1], layout, meta.device)], layout)
        check_order(nibble, block.start)
        place(nibble, bits[block], out[block])
    return out.view(rows, 4 * groups).view(packed.dtype)


def check(meta: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuses illegal nibbles without decoding. Which row they are in, :func:`decode` says."""
    layout = LAYOUTS[dtype]
    for block in row_blocks(meta.shape[0], meta.shape[1] * 4 * layout.groups_per_word):
        nibble = word_nibbles(meta[block], layout)
        if ((nibble & 3) >= (nibble >> 2)).any():
            raise MalformedError("metadata has an illegal nibble")


def meta_of(metadata: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``meta`` of the row-major nibbles of ``sparse24``'s metadata ``[R, C/8]``, for a matrix of ``dtype``.

    Two (I16) or four (I32) bytes of that metadata are one word, little-endian: only the order differs.
    """
    layout = LAYOUTS[dtype]
    words = metadata.contiguous().view(layout.word)
    meta = torch.empty_like(words)
    rows, columns = words.shape
    for block in row_blocks(rows, columns):
        meta.view(-1)[places(block, rows, columns, layout, words.device)] = words[block]
    return meta


def word_nibbles(words: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Words ``[R, c]`` to nibbles ``[R, c * groups_per_word]``, lowest bits first."""
    shifts = torch.arange(0, 4 * layout.groups_per_word, 4, dtype=words.dtype, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(1)


def places(block: slice, rows: int, columns: int, layout: Layout, device: torch.device) -> torch.Tensor:
    """Where the words of some rows lie in ``meta`` read as one row: ``[block, columns]``."""
    r = torch.arange(block.start, block.stop, device=device).unsqueeze(1)
    c = torch.arange(columns, device=device).unsqueeze(0)
    tile = layout.rows_per_tile
    r = r // tile * tile + r % 8 * layout.interweave + r % tile // 8
    down = ((r % 2 == 0) & (c % 2 == 1)).long()
    up = ((r % 2 == 1) & (c % 2 == 0)).long()
    r, c = r + down - up, c - down + up
    return c // 2 * 2 * rows + 2 * r + c % 2
