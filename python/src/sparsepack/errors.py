"""The exceptions of this package."""

from __future__ import annotations

from pathlib import Path


class FormatError(ValueError):
    """A file is not what docs/FORMATS.md demands.

    ``path`` is the file or directory, ``tensor`` the tensor that is wrong, if it is one.
    """

    def __init__(self, path: Path | str, problem: str, tensor: str | None = None) -> None:
        self.path = Path(path)
        self.tensor = tensor
        self.problem = problem
        where = f"{path}: {tensor}" if tensor is not None else f"{path}"
        super().__init__(f"{where}: {problem}")


class SparseUnavailableError(RuntimeError):
    """Semi-structured weights were asked for (``sparse=True``) and cannot be had."""


class MalformedError(ValueError):
    """What a decoder finds wrong; becomes a :class:`FormatError` where file and tensor are known."""


def check_name(path: Path, name: str) -> None:
    """Tensor names are 1 to 4096 bytes without control characters."""
    if not 0 < len(name.encode("utf-8", "replace")) <= 4096 or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
        raise FormatError(path, f"tensor name {name!r:.80} is empty, too long or has control characters")
