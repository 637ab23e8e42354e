"""2:4 weights as ``torch.sparse`` semi-structured tensors, and which of them a device can use.

Two classes of torch 2.10 multiply with sparse tensor cores. CUTLASS takes the components that
``torch-cutlass`` stores and runs on compute capability 8.x only (torch's kernel refuses others).
cuSPARSELt runs from 8.0 on, but its packed bytes are private to the library, so a weight is decoded on
the device and compressed there, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from .dtypes import NAMES
from .encodings import Encoding, sparse24, torch_cutlass
from .encodings.sparse24 import Sparse24
from .encodings.torch_cutlass import TorchCutlass
from .errors import MalformedError

CUTLASS, CUSPARSELT = "cutlass", "cusparselt"
FLOATS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Hardware:
    """What decides whether semi-structured weights can be had."""

    device: torch.device
    capability: tuple[int, int] | None
    cusparselt: bool

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
            return cls(device, None, False)
        return cls(device, torch.cuda.get_device_capability(device), torch.backends.cusparselt.is_available())

    def problem(self) -> str | None:
        """Why no weight can be semi-structured on this device, or nothing."""
        if self.capability is None:
            return f"torch has no NVIDIA GPU as {self.device}" if self.device.type == "cuda" else f"on {self.device}"
        major, minor = self.capability
        if major < 8:
            return f"compute capability {major}.{minor} of {self.device} is below 8.0"
        if major > 8 and not self.cusparselt:
            return f"torch has no cuSPARSELt, and CUTLASS kernels do not run on compute capability {major}.{minor}"
        return None


def choose(hardware: Hardware, encoding: Encoding, dtype: torch.dtype, wanted: str | None) -> tuple[str, str]:
    """``(backend, "")`` for a 2:4 weight to be used as ``dtype``, or ``("", why not)``.

    Left to choose, ``torch-cutlass`` goes to CUTLASS, whose bytes it has, and ``sparse24`` to
    cuSPARSELt, each to the other where it cannot.
    """
    if not isinstance(encoding, (Sparse24, TorchCutlass)):
        return "", f"stored as {encoding.name}, not as 2:4"
    if (general := hardware.problem()) is not None:
        return "", general
    order = (CUTLASS, CUSPARSELT) if isinstance(encoding, TorchCutlass) else (CUSPARSELT, CUTLASS)
    reasons = []
    for backend in order if wanted is None else (wanted,):
        if (reason := backend_problem(hardware, backend, dtype, encoding.shape)) is None:
            return backend, ""
        reasons.append(f"{backend}: {reason}")
    return "", "; ".join(reasons)


def backend_problem(hardware: Hardware, backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    """Why a backend cannot multiply by a matrix, or nothing."""
    if dtype not in FLOATS:
        return f"no 2:4 kernel multiplies {NAMES.get(dtype, dtype)} weights and activations"
    if backend == CUTLASS:
        if hardware.capability is not None and hardware.capability[0] != 8:
            return "torch's kernels run on compute capability 8.x only"
        return torch_cutlass.problem(dtype, shape)
    if not hardware.cusparselt:
        return "torch was built without it"
    limits = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[dtype]
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    if 0 in shape or shape[0] % rows or shape[1] % columns:
        return f"shape {list(shape)} is not in multiples of [{rows}, {columns}]"
    return None


def build(
    backend: str, encoding: Encoding, parts: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> SparseSemiStructuredTensor:
    """The semi-structured tensor of a 2:4 weight on a device, as ``dtype``."""
    on_device = {suffix: part.to(device) for suffix, part in parts.items()}
    if backend == CUSPARSELT:
        dense = encoding.decode(on_device).to(dtype)
        return SparseSemiStructuredTensorCUSPARSELT.from_dense(dense)
    packed, meta = cutlass_parts(encoding, on_device)
    return SparseSemiStructuredTensorCUTLASS(
        torch.Size(encoding.shape),
        packed=packed.to(dtype),
        meta=meta,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
        requires_grad=False,
    )


def cutlass_parts(encoding: Encoding, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``packed`` and ``meta`` of CUTLASS, checked. ``sparse24`` has the same pairs and nibbles in another order."""
    if isinstance(encoding, TorchCutlass):
        torch_cutlass.check(parts[".meta"], encoding.dtype)
        return parts[".packed"].contiguous(), parts[".meta"].contiguous()
    if not isinstance(encoding, Sparse24):
        raise MalformedError(f"{encoding.name} is not 2:4")
    values, metadata = parts[".values"], parts[".metadata"]
    sparse24.check(metadata, encoding.shape[1] // 4)
    return values.contiguous(), torch_cutlass.meta_of(metadata, torch.float16)
