"""Quantized matrices: ``scale * (code - zero_point)``, as ``int`` and as compressed-tensors stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import NAMES
from ..errors import MalformedError
from . import nm, sparse24
from .base import Component, count_of, declared_matrix, first, row_blocks, unpack_bits
from .bitmask import OFFSET_ROWS, check_counts, checked_offsets

PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
SCALES = (torch.float16, torch.bfloat16, torch.float32)

Codes = Callable[[slice, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """What codes stand for: their bits, the columns that share a scale (none: a row), and whether zero points are 0."""

    bits: int
    group_size: int | None
    symmetric: bool

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> Grid:
        if type(declaration["symmetric"]) is not bool:
            raise MalformedError(f"declared symmetric is {declaration['symmetric']!r} (expected true or false)")
        group_size = count_of(declaration, "group_size", 1, (1 << 32) - 1) if "group_size" in declaration else None
        return cls(count_of(declaration, "bits", 2, 8), group_size, declaration["symmetric"])

    @property
    def half(self) -> int:
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        if columns == 0:
            raise MalformedError("codes of no columns")
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise MalformedError(f"{columns} columns are not whole groups of {self.group_size}")
        return columns // self.group_size


def declared_grid(
    declaration: Mapping[str, Any], keys: frozenset[str] = frozenset()
) -> tuple[torch.dtype, tuple[int, int], Grid]:
    """Type, shape and grid of a declaration that has exactly ``keys`` besides those."""
    grouped = {"group_size"} & set(declaration)
    dtype, shape = declared_matrix(declaration, {"bits", "symmetric"} | keys | grouped)
    check_scales(dtype)
    grid = Grid.declared(declaration)
    grid.groups(shape[1])
    return dtype, shape, grid


def check_scales(dtype: torch.dtype) -> None:
    """Refuses element types that scales cannot have."""
    if dtype not in SCALES:
        raise MalformedError(f"scales are {NAMES[dtype]} (expected F16, BF16 or F32)")


@dataclass(frozen=True)
class Int:
    """Sparsepack's own: ``.codes``, their positions unless all are kept, ``.scales`` and ``.zero_points``."""

    dtype: torch.dtype
    shape: tuple[int, int]
    grid: Grid
    kept: str = "all"
    pattern: tuple[int, int] = (0, 0)
    room: int = 0
    name: str = "int"

    @classmethod
    def declared(cls, declaration: Mapping[str, Any]) -> Int:
        kept = declaration.get("kept")
        keys = {"all": [], "sparse24": [], "nm": ["n", "m"], "bitmask": ["room"]}
        if not isinstance(kept, str) or kept not in keys:
            raise MalformedError(f"declared kept is {kept!r} (expected {', '.join(keys)})")
        dtype, shape, grid = declared_grid(declaration, frozenset(["kept", *keys[kept]]))
        pattern, room = (0, 0), 0
        if kept == "sparse24":
            pattern = (2, 4)
        elif kept == "nm":
            m = count_of(declaration, "m", 2, 16)
            pattern = (count_of(declaration, "n", 1, m - 1), m)
            if pattern == (2, 4):
                raise MalformedError("2:4 is declared as nm (expected sparse24)")
        elif kept == "bitmask":
            room = count_of(declaration, "room", 0, shape[0] * shape[1])
        if pattern[1] and shape[1] % pattern[1]:
            raise MalformedError(f"{shape[1]} columns are not whole groups of {pattern[1]}")
        return cls(dtype, shape, grid, kept, pattern, room)

    def components(self) -> list[Component]:
        rows, columns = self.shape
        n, m = self.pattern
        groups = self.grid.groups(columns)
        codes = (self.room,) if self.kept == "bitmask" else (rows, columns // m * n if m else columns)
        parts = [self._packed(".codes", codes)]
        if self.kept != "all":
            suffix = ".metadata" if self.kept == "sparse24" else ".mask"
            parts.append(Component(suffix, torch.uint8, (rows, -(-columns // 8))))
        if self.kept == "bitmask":
            parts.append(Component(".offsets", torch.uint64, (-(-rows // OFFSET_ROWS) + 1,)))
        parts.append(Component(".scales", self.dtype, (rows, groups)))
        if not self.grid.symmetric:
            parts.append(self._packed(".zero_points", (rows, groups)))
        return parts

    def _packed(self, suffix: str, shape: tuple[int, ...]) -> Component:
        if self.grid.bits == 8:
            return Component(suffix, torch.int8, shape)
        return Component(suffix, torch.uint8, (*shape[:-1], -(-shape[-1] * self.grid.bits // 8)))

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        bits, columns = self.grid.bits, self.shape[1]
        points = None
        if not self.grid.symmetric:
            points = signed(unpack(parts[".zero_points"], self.grid.groups(columns), bits, ".zero_points"), bits)
        codes = {"all": self._all, "sparse24": self._sparse24, "nm": self._nm, "bitmask": self._bitmask}[self.kept]
        return values(self.shape, self.grid, parts[".scales"], points, codes(parts))

    def _all(self, parts: Mapping[str, torch.Tensor]) -> Codes:
        bits, columns = self.grid.bits, self.shape[1]
        return lambda block, _: signed(unpack(parts[".codes"][block], columns, bits, ".codes", block.start), bits)

    def _sparse24(self, parts: Mapping[str, torch.Tensor]) -> Codes:
        def codes(block: slice, zero: torch.Tensor) -> torch.Tensor:
            nibble = sparse24.nibbles(parts[".metadata"][block], self.shape[1] // 4, block.start).unsqueeze(-1)
            column = torch.arange(4, dtype=torch.uint8, device=nibble.device)
            kept = ((nibble & 3) == column) | ((nibble >> 2) == column)
            return self._spread(parts, block, kept.flatten(1), zero)

        return codes

    def _nm(self, parts: Mapping[str, torch.Tensor]) -> Codes:
        def codes(block: slice, zero: torch.Tensor) -> torch.Tensor:
            kept = unpack_bits(parts[".mask"][block], self.shape[1], block.start)
            nm.check_counts(kept, *self.pattern, block.start)
            return self._spread(parts, block, kept, zero)

        return codes

    def _spread(
        self, parts: Mapping[str, torch.Tensor], block: slice, kept: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        """Stored codes of rows at the columns that are kept, zero points at the others."""
        n, m = self.pattern
        stored = unpack(parts[".codes"][block], self.shape[1] // m * n, self.grid.bits, ".codes", block.start)
        return zero.masked_scatter(kept, signed(stored, self.grid.bits))

    def _bitmask(self, parts: Mapping[str, torch.Tensor]) -> Codes:
        bits, bounds = self.grid.bits, checked_offsets(parts[".offsets"], self.room)
        stream = unpack(parts[".codes"].unsqueeze(0), self.room, bits, ".codes")[0]
        if stream[bounds[-1] :].any():
            raise MalformedError(f"codes behind the last kept one, {bounds[-1]}, are not all zero")

        def codes(block: slice, zero: torch.Tensor) -> torch.Tensor:
            kept = unpack_bits(parts[".mask"][block], self.shape[1], block.start)
            stripes = bounds[block.start // OFFSET_ROWS : -(-block.stop // OFFSET_ROWS) + 1]
            check_counts(kept, stripes, block.start)
            return zero.masked_scatter(kept, signed(stream[stripes[0] : stripes[-1]], bits))

        return codes


@dataclass(frozen=True)
class Quantized:
    """A weight in one of compressed-tensors' three formats; components stand in the place of ``.weight``."""

    dtype: torch.dtype
    shape: tuple[int, int]
    grid: Grid
    name: str

    @classmethod
    def declared(cls, format_name: str, declaration: Mapping[str, Any]) -> Quantized:
        if format_name == FLOAT:
            dtype, shape = declared_matrix(declaration, set())
            check_scales(dtype)
            return cls.of(dtype, shape, Grid(8, None, True), FLOAT)
        dtype, shape, grid = declared_grid(declaration)
        return cls.of(dtype, shape, grid, format_name)

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, int], grid: Grid, format_name: str) -> Quantized:
        """An encoding whose parameters fit each other."""
        grid.groups(shape[1])
        if format_name == INT and grid.bits != 8:
            raise MalformedError(f"{INT} codes have {grid.bits} bits (expected 8)")
        return cls(dtype, shape, grid, format_name)

    def components(self) -> list[Component]:
        rows, columns = self.shape
        bits, groups = self.grid.bits, self.grid.groups(columns)
        scale = Component(".weight_scale", self.dtype, (rows, groups))
        if self.name == FLOAT:
            return [Component(".weight", torch.float8_e4m3fn, self.shape), scale]
        if self.name == INT:
            parts = [Component(".weight", torch.int8, self.shape), scale]
            if not self.grid.symmetric:
                parts.append(Component(".weight_zero_point", torch.int8, (rows, groups)))
            return parts
        parts = [Component(".weight_packed", torch.int32, (rows, -(-columns * bits // 32))), scale]
        if not self.grid.symmetric:
            parts.append(Component(".weight_zero_point", torch.int32, (-(-rows * bits // 32), groups)))
        return [*parts, Component(".weight_shape", torch.int64, (2,))]

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        points = self._points(parts)
        if self.name != PACK:
            weight = parts[".weight"]
            wide = torch.float32 if self.name == FLOAT else torch.int16
            return values(
                self.shape, self.grid, parts[".weight_scale"], points, lambda block, _: weight[block].to(wide)
            )
        if tuple(parts[".weight_shape"].tolist()) != self.shape:
            raise MalformedError(f".weight_shape is {parts['.weight_shape'].tolist()} (expected {list(self.shape)})")
        packed, bits, half = parts[".weight_packed"].contiguous().view(torch.uint8), self.grid.bits, self.grid.half

        def codes(block: slice, _: torch.Tensor) -> torch.Tensor:
            return unpack(packed[block], self.shape[1], bits, ".weight_packed", block.start) - half

        return values(self.shape, self.grid, parts[".weight_scale"], points, codes)

    def _points(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Zero points ``[R, G]``."""
        if self.grid.symmetric:
            return None
        stored = parts[".weight_zero_point"]
        if self.name == INT:
            return stored.to(torch.int16)
        streams = stored.t().clone(memory_format=torch.contiguous_format).view(torch.uint8).view(stored.shape[1], -1)
        return unpack(streams, self.shape[0], self.grid.bits, ".weight_zero_point").t() - self.grid.half


def unpack(packed: torch.Tensor, count: int, bits: int, suffix: str, first_row: int = 0) -> torch.Tensor:
    """``[R, B]`` bytes of ``bits``-bit numbers, lowest bit first, to ``[R, count]`` (int16). Unused bits must be 0."""
    if bits == 8 and packed.shape[1] == count:
        return packed.view(torch.uint8).to(torch.int16)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flags = ((packed.view(torch.uint8).unsqueeze(-1) >> shifts) & 1).flatten(1)
    unused = flags[:, count * bits :].any(1)
    if unused.any():
        raise MalformedError(f"row {first_row + first(unused)}: an unused bit of {suffix} is set")
    weights = 1 << torch.arange(bits, dtype=torch.int16, device=packed.device)
    numbers = flags[:, : count * bits].reshape(-1, count, bits)
    return (numbers * weights).sum(-1, dtype=torch.int16)


def signed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of ``bits`` bits as two's complement."""
    half = 1 << (bits - 1)
    return (numbers ^ half) - half


def values(
    shape: tuple[int, int], grid: Grid, scales: torch.Tensor, points: torch.Tensor | None, codes: Codes
) -> torch.Tensor:
    """``scale * (code - zero_point)`` of a matrix whose codes come by blocks of rows.

    ``codes`` is given a block and the codes of zeros there, ``[R, C]``.
    """
    rows, columns = shape
    wrong = ~scales.isfinite() | scales.signbit()
    if wrong.any():
        row, group = (int(index) for index in wrong.nonzero()[0])
        raise MalformedError(f"row {row}, group {group}: scale is {scales[row, group].item()} (expected 0 or more)")
    repeats = columns // grid.groups(columns)
    out = torch.empty(shape, dtype=scales.dtype, device=scales.device)
    for block in row_blocks(rows, columns, OFFSET_ROWS):
        scale = scales[block].float().repeat_interleave(repeats, 1)
        if points is None:
            zero = torch.zeros(scale.shape, dtype=torch.int16, device=scale.device)
        else:
            zero = points[block].repeat_interleave(repeats, 1)
        found = codes(block, zero)
        # Differences of codes are exact, so this rounds once to f32, and f32 holds products for the shorter types.
        out[block] = (scale * (found - zero if found.dtype == torch.int16 else found).float()).to(scales.dtype)
        if not out[block].isfinite().all():
            row, column = (int(index) for index in (~out[block].isfinite()).nonzero()[0])
            raise MalformedError(f"row {block.start + row}, column {column}: the value is not finite")
    return out
