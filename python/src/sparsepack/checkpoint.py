"""Packed directories: which tensors they hold, and how each is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch

from .encodings import Encoding
from .errors import FormatError, MalformedError


class Checkpoint(ABC):
    """The tensors of a directory, by logical name, in stored order.

    ``encodings`` says how each is stored; its ``dtype`` and ``shape`` are those of the dense tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.encodings: dict[str, Encoding] = {}

    @abstractmethod
    def components(self, name: str) -> dict[str, torch.Tensor]:
        """The stored tensors of one, by suffix, on the CPU; their types and shapes are checked."""

    def dense(self, name: str) -> torch.Tensor:
        """One decoded tensor, on the CPU.

        Raises:
            KeyError: there is no such tensor.
            FormatError: its components are not what the format demands.
        """
        try:
            return self.encodings[name].decode(self.components(name))
        except MalformedError as wrong:
            raise FormatError(self.path, str(wrong), name) from None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.encodings:
            yield name, self.dense(name)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Opens a directory that sparsepack wrote: safetensors, plain or packed, or ``model.spz``.

    Headers are read and checked, tensors are not.

    Raises:
        FormatError: the directory is not in one of the formats of docs/FORMATS.md.
        ImportError: ``model.spz`` needs the ``zst`` extra.
    """
    from .container import ContainerCheckpoint
    from .safetensors_directory import SafetensorsCheckpoint

    path = Path(directory)
    found = [
        name for name in ("model.spz", "model.safetensors", "model.safetensors.index.json") if (path / name).is_file()
    ]
    if len(found) != 1:
        what = " and ".join(found) if found else "no model.safetensors, index of shards or model.spz"
        raise FormatError(path, f"{what} in the directory (expected one of them)")
    if found == ["model.spz"]:
        return ContainerCheckpoint(path / "model.spz")
    return SafetensorsCheckpoint(path)


def read(directory: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a packed directory, dense, by name, on the CPU."""
    return dict(iterate(directory))


def iterate(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and dense tensors, one at a time: only the current one is decoded."""
    yield from open_checkpoint(directory)
