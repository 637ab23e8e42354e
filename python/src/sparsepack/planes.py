"""Chunks of ``model.spz``: byte planes and masks in zstd frames, back to elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .dtypes import bits_of
from .errors import MalformedError

# Floats are stored rotated left by one bit: the sign is behind the mantissa.
ROTATED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class Frames:
    """The compressed frames of a chunk, which begins at ``offset`` of the file."""

    data: list[bytes]
    offset: int

    def decompress(self, number: int, size: int) -> torch.Tensor:
        """The bytes of one frame, which must be ``size``: that is checked before they are decompressed."""
        zstandard = import_zstandard()
        data = self.data[number]
        where = f"offset {self.offset + sum(map(len, self.data[:number]))}"
        try:
            frame = zstandard.get_frame_parameters(data)
            if not frame.has_checksum:
                raise MalformedError(f"{where}: frame has no checksum")
            if frame.content_size != size:
                found = "no size" if frame.content_size > 1 << 62 else f"{frame.content_size} bytes"
                raise MalformedError(f"{where}: frame states {found} (expected {size} bytes)")
            plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as wrong:
            raise MalformedError(f"{where}: frame is damaged: {wrong}") from None
        if len(plain) != size:
            raise MalformedError(f"{where}: frame holds {len(plain)} bytes (expected {size})")
        # frombuffer wants memory that may be written, and refuses none at all.
        return torch.frombuffer(bytearray(plain), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def import_zstandard() -> Any:
    """The ``zstandard`` package, which only containers need."""
    try:
        import zstandard
    except ImportError:
        raise ImportError("model.spz needs the zstandard package: pip install 'sparsepack[zst]'") from None
    return zstandard


def join(frames: Frames, masked: bool, dtype: torch.dtype, out: torch.Tensor) -> None:
    """Writes the bytes of a chunk to ``out``, a part of a component of ``dtype``."""
    elements = out.numel() // dtype.itemsize
    bits = out.view(bits_of(dtype))
    if not masked:
        bits.copy_(elements_of(frames, 0, dtype, elements))
        return
    mask = mask_of(frames.decompress(0, -(-elements // 8)), elements, frames.offset)
    kept = elements_of(frames, 1, dtype, int(mask.sum()))
    bits.zero_().masked_scatter_(mask, kept)


def mask_of(packed: torch.Tensor, elements: int, offset: int) -> torch.Tensor:
    """A flag for each element, from bytes whose lowest bits come first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    flags = ((packed.unsqueeze(-1) >> shifts) & 1).flatten().bool()
    if flags[elements:].any():
        raise MalformedError(f"offset {offset}: an unused bit of the mask is set")
    return flags[:elements]


def elements_of(frames: Frames, first: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """Elements as integers, from their byte planes, the most significant first."""
    width = dtype.itemsize
    planes = [frames.decompress(first + plane, count) for plane in range(width)]
    bits = torch.stack(planes[::-1], dim=-1).view(bits_of(dtype)).flatten()
    if dtype not in ROTATED:
        return bits
    top = 8 * width - 1
    return ((bits >> 1) & ((1 << top) - 1)) | ((bits & 1) << top)
