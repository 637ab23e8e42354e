"""Reads checkpoints that sparsepack packed.

``read`` and ``iterate`` give dense tensors, ``open_checkpoint`` the components as they are stored, ``load``
a transformers model, with 2:4 weights on the GPU where it can use them. The byte layouts are those of
docs/FORMATS.md, read from that document and not from sparsepack's code.
"""

from .checkpoint import Checkpoint, iterate, open_checkpoint, read
from .errors import FormatError, SparseUnavailableError
from .loading import LoadReport, load

__all__ = [
    "Checkpoint",
    "FormatError",
    "LoadReport",
    "SparseUnavailableError",
    "iterate",
    "load",
    "open_checkpoint",
    "read",
]
