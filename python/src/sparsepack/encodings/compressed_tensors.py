"""Legacy: ``sparse-24-bitmask`` and ``sparse-bitmask`` as compressed-tensors 0.9 to 0.14.0.1 wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import bits_of
from ..errors import MalformedError
from .base import Component, count_of, declared_matrix, first, row_blocks, unpack_bits

SPARSE_24 = "sparse-24-bitmask"
SPARSE = "sparse-bitmask"
# What a container calls them, which cannot tell them by config.json.
DECLARED_24, DECLARED = "ct-sparse24-bitmask", "ct-sparse-bitmask"
STORABLE = {torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8}
# Component suffixes, in the place of ".weight".
COMPRESSED, BITMASK, SHAPE, ROW_OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"
SUFFIXES = {SPARSE_24: (COMPRESSED, BITMASK, SHAPE), SPARSE: (COMPRESSED, BITMASK, SHAPE, ROW_OFFSETS)}


@dataclass(frozen=True)
class Sparse24Bitmask:
    """Two kept elements and two mask bits for each group of four columns."""

    dtype: torch.dtype
    shape: tuple[int, int]
    name: str = SPARSE_24

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> Sparse24Bitmask:
        dtype, shape = declared_matrix(declaration, set())
        check_storable(dtype, shape, SPARSE_24)
        return cls(dtype, shape)

    def components(self) -> list[Component]:
        rows, columns = self.shape
        return [
            Component(COMPRESSED, self.dtype, (rows, columns // 2)),
            Component(BITMASK, torch.uint8, (rows, -(-columns // 8))),
            Component(SHAPE, torch.int64, (2, 1)),
        ]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        check_shape(parts[SHAPE], self.shape)
        return decode_24(parts[COMPRESSED], parts[BITMASK])


@dataclass(frozen=True)
class SparseBitmask:
    """The stored elements, a mask bit for each column, and an offset for each row."""

    dtype: torch.dtype
    shape: tuple[int, int]
    kept: int
    name: str = SPARSE

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> SparseBitmask:
        dtype, shape = declared_matrix(declaration, {"kept"})
        check_storable(dtype, shape, SPARSE)
        return cls(dtype, shape, count_of(declaration, "kept", 0, shape[0] * shape[1]))

    def components(self) -> list[Component]:
        rows, columns = self.shape
        return [
            Component(COMPRESSED, self.dtype, (self.kept,)),
            Component(BITMASK, torch.uint8, (rows, -(-columns // 8))),
            Component(SHAPE, torch.int64, (2,)),
            Component(ROW_OFFSETS, torch.int64, (rows,)),
        ]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        check_shape(parts[SHAPE], self.shape)
        return decode_bitmask(parts[COMPRESSED], parts[BITMASK], parts[ROW_OFFSETS], self.shape[1])


def inferred(format_name: str, compressed: Component, shape: torch.Tensor) -> Sparse24Bitmask | SparseBitmask:
    """The encoding of a weight in a safetensors directory, where nothing declares it but ``.shape``."""
    if shape.dtype != torch.int64 or shape.numel() != 2:
        raise MalformedError(f"{SHAPE} is {shape.dtype} {list(shape.shape)} (expected two I64)")
    rows, columns = (int(size) for size in shape.flatten())
    if rows < 0 or columns < 0:
        raise MalformedError(f"{SHAPE} is {rows}, {columns}")
    check_storable(compressed.dtype, (rows, columns), format_name)
    if format_name == SPARSE_24:
        return Sparse24Bitmask(compressed.dtype, (rows, columns))
    if len(compressed.shape) != 1:
        raise MalformedError(f"{COMPRESSED} has shape {list(compressed.shape)} (expected one dimension)")
    return SparseBitmask(compressed.dtype, (rows, columns), compressed.shape[0])


def check_storable(dtype: torch.dtype, shape: tuple[int, int], format_name: str) -> None:
    """Refuses types and shapes that a format does not hold."""
    if dtype not in STORABLE:
        raise MalformedError(f"element type {dtype} cannot be stored as {format_name}")
    if format_name == SPARSE_24 and shape[1] % 4:
        raise MalformedError(f"{shape[1]} columns are not whole groups of 4")


def check_shape(stored: torch.Tensor, shape: tuple[int, int]) -> None:
    """The shape component must say what its neighbours have."""
    if tuple(stored.flatten().tolist()) != shape:
        raise MalformedError(f"{SHAPE} is {stored.flatten().tolist()} (expected {list(shape)})")


def decode_24(compressed: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """``[R, C/2]`` values and ``[R, ceil(C/8)]`` bytes of bits to ``[R, C]``."""
    rows, columns = compressed.shape[0], compressed.shape[1] * 2
    bits = compressed.contiguous().view(bits_of(compressed.dtype))
    out = torch.zeros((rows, columns), dtype=bits.dtype, device=bits.device)
    for block in row_blocks(rows, columns):
        kept = unpack_bits(bitmask[block], columns, block.start)
        counts = kept.view(kept.shape[0], -1, 4).sum(-1)
        if (counts != 2).any():
            row, group = (int(index) for index in (counts != 2).nonzero()[0])
            raise MalformedError(
                f"row {block.start + row}, group {group}: bitmask keeps {int(counts[row, group])} of 4 (expected 2)"
            )
        out[block].masked_scatter_(kept, bits[block])
    return out.view(compressed.dtype)


def decode_bitmask(
    compressed: torch.Tensor, bitmask: torch.Tensor, row_offsets: torch.Tensor, columns: int
) -> torch.Tensor:
    """Stored values, ``[R, ceil(C/8)]`` bytes of bits and ``[R]`` offsets to ``[R, C]``."""
    rows = bitmask.shape[0]
    bits = compressed.contiguous().view(bits_of(compressed.dtype))
    end = torch.tensor([bits.shape[0]], device=row_offsets.device)
    bounds = torch.cat((row_offsets, end))
    if rows == 0 and bits.shape[0]:
        raise MalformedError(f"{bits.shape[0]} values are stored for no row")
    if rows and int(bounds[0]) != 0:
        raise MalformedError(f"row 0: offset is {int(bounds[0])} (expected 0)")
    out = torch.zeros((rows, columns), dtype=bits.dtype, device=bits.device)
    for block in row_blocks(rows, columns):
        kept = unpack_bits(bitmask[block], columns, block.start)
        found, expected = kept.sum(1), bounds[block.start : block.stop + 1].diff()
        if (found != expected).any():
            row = first(found != expected)
            raise MalformedError(
                f"row {block.start + row}: bitmask keeps {int(found[row])} elements "
                f"(expected {int(expected[row])} by the offsets)"
            )
        out[block].masked_scatter_(kept, bits[int(bounds[block.start]) : int(bounds[block.stop])])
    return out.view(compressed.dtype)
