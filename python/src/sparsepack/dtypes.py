"""Element types by their safetensors names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .errors import MalformedError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# Decoders move elements as integers of the same width, so that every bit survives.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_of(name: object) -> torch.dtype:
    """The torch type of a safetensors type name."""
    if not isinstance(name, str) or name not in DTYPES:
        raise MalformedError(f"unknown element type {name!r}")
    return DTYPES[name]


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The integer type that holds an element's bits."""
    return _BITS[dtype.itemsize]


def byte_count(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
