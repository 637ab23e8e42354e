"""What an encoding is: a declaration that fixes its components, and a decoder of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..dtypes import dtype_of
from ..errors import MalformedError

# Rows are decoded in blocks of about this many elements: the decoders' temporaries are a few bytes an element.
BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Component:
    """One stored tensor of a packed one: ``suffix`` goes behind the logical name."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Encoding(Protocol):
    """A declared encoding of one tensor."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def components(self) -> list[Component]:
        """The stored tensors, in the order in which containers hold them."""
        ...

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The dense tensor; ``parts`` by suffix, of the types and shapes of :meth:`components`."""
        ...


def row_blocks(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices that cover ``rows`` rows, each of a bounded number of elements and a ``multiple`` of rows."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def unpack_bits(mask: torch.Tensor, columns: int, first_row: int) -> torch.Tensor:
    """``[R, ceil(C/8)]`` bytes, lowest bit first, to ``[R, C]`` flags. Unused bits must be 0."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask.unsqueeze(-1) >> shifts) & 1).flatten(1).bool()
    if bits[:, columns:].any():
        row = first_row + first(bits[:, columns:].any(1))
        raise MalformedError(f"row {row}: an unused mask bit is set")
    return bits[:, :columns]


def first(flags: torch.Tensor) -> int:
    """The index of the first set flag of a vector that has one."""
    return int(flags.nonzero()[0].item())


def declared_matrix(declaration: Mapping[str, Any], keys: set[str]) -> tuple[torch.dtype, tuple[int, int]]:
    """Type and shape of a declaration that has exactly ``keys`` besides encoding, dtype and shape."""
    expected = {"encoding", "dtype", "shape"} | keys
    if set(declaration) != expected:
        raise MalformedError(f"declaration has keys {sorted(declaration)} (expected {sorted(expected)})")
    shape = shape_of(declaration["shape"])
    if len(shape) != 2:
        raise MalformedError(f"declared shape {list(shape)} is not a matrix")
    return dtype_of(declaration["dtype"]), (shape[0], shape[1])


def shape_of(value: object) -> tuple[int, ...]:
    """A shape from JSON: a list of sizes."""
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in value):
        raise MalformedError(f"shape is {value!r} (expected a list of sizes)")
    return tuple(value)


def count_of(declaration: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """An integer of a declaration, within limits."""
    value = declaration[key]
    if type(value) is not int or not low <= value <= high:
        raise MalformedError(f"declared {key} is {value!r} (expected {low} to {high})")
    return value


def packable(dtype: torch.dtype) -> None:
    """Refuses element types that no packed encoding holds."""
    if dtype not in PACKABLE:
        raise MalformedError(f"element type {dtype} cannot be packed")


PACKABLE = {torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8}
