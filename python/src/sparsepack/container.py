"""``model.spz``: every tensor of a checkpoint in zstd frames over byte planes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from . import encodings
from .checkpoint import Checkpoint
from .dtypes import byte_count
from .encodings import Encoding
from .errors import FormatError, MalformedError, check_name
from .planes import Frames, join
from .strict_json import parse_object

MAGIC = b"SPARSEPK"
VERSION = 1
HEADER = b"\x5a\x2a\x4d\x18\x10\x00\x00\x00" + MAGIC
HEADER_BYTES = 24
RECORD_MAGIC = b"\x5b\x2a\x4d\x18"
FOOTER_MAGIC = b"\x5c\x2a\x4d\x18"
FOOTER_FIXED = 8 + 32 + 8 + 8  # skippable frame's header, sha256, length of the index, magic
CHUNK_LIMIT = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """Where a chunk's frames lie, and whether the first of them is a mask."""

    offset: int
    mask: bool
    frames: list[int]


@dataclass(frozen=True)
class StoredComponent:
    """A component's digest and chunks."""

    sha256: str
    chunks: list[Chunk]


class ContainerCheckpoint(Checkpoint):
    """The tensors of one ``model.spz``.

    Opening checks header, footer, index and records, and that frames lie end to end; frames themselves
    are checked, and components' digests compared, when a tensor is read.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._components: dict[str, list[StoredComponent]] = {}
        with file.open("rb") as opened:
            index, self._end = read_index(file, opened)
            fields = parse_object(file, index, "index")
            try:
                self._chunk_bytes = chunk_bytes_of(fields)
                end = self._take_tensors(fields, opened, index)
                check_files(fields, end, self._end)
            except MalformedError as wrong:
                raise FormatError(file, str(wrong)) from None

    def _take_tensors(self, fields: dict[str, Any], opened: BinaryIO, index: bytes) -> int:
        """Takes in the tensors of the index, in file order. Returns the offset behind the last record."""
        position = HEADER_BYTES
        for entry in field(fields, "tensors", list):
            name = field(entry, "name", str)
            check_name(self.path, name)
            if name in self.encodings:
                raise FormatError(self.path, "two tensors have this name", name)
            try:
                encoding, stored = parse_tensor(entry, self._chunk_bytes)
                position = end_of_chunks(stored, position)
                position = check_record(opened, position, entry, index, self._end)
            except MalformedError as wrong:
                raise FormatError(self.path, str(wrong), name) from None
            self.encodings[name] = encoding
            self._components[name] = stored
        return position

    def components(self, name: str) -> dict[str, torch.Tensor]:
        encoding = self.encodings[name]
        with self.path.open("rb") as opened:
            try:
                return {
                    component.suffix: self._component(opened, component.dtype, component.shape, stored)
                    for component, stored in zip(encoding.components(), self._components[name], strict=True)
                }
            except MalformedError as wrong:
                raise FormatError(self.path, str(wrong), name) from None

    def _component(
        self, opened: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...], stored: StoredComponent
    ) -> torch.Tensor:
        # Chunks were counted against this size when the index was read.
        out = torch.empty(byte_count(dtype, shape), dtype=torch.uint8)
        for number, chunk in enumerate(stored.chunks):
            part = out[number * self._chunk_bytes : (number + 1) * self._chunk_bytes]
            opened.seek(chunk.offset)
            frames = Frames([opened.read(size) for size in chunk.frames], chunk.offset)
            join(frames, chunk.mask, dtype, part)
        if hashlib.sha256(out.numpy().data).hexdigest() != stored.sha256:
            raise MalformedError(f"sha256 of the decoded bytes is not {stored.sha256}")
        return out.view(dtype).view(shape)


def read_index(file: Path, opened: BinaryIO) -> tuple[bytes, int]:
    """The index, checked against its digest, and the offset of the footer."""
    header = opened.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or not header.startswith(HEADER):
        raise FormatError(file, "does not start with the header of a container")
    version = int.from_bytes(header[16:20], "little")
    if version != VERSION:
        raise FormatError(file, f"container version {version} (expected {VERSION})")
    if header[20:] != bytes(4):
        raise FormatError(file, f"bytes 20 to 24 are {header[20:].hex(' ')} (expected zeros)")
    size = opened.seek(0, 2)
    if size < HEADER_BYTES + FOOTER_FIXED:
        raise FormatError(file, f"{size} bytes have no room for a footer")
    opened.seek(size - 16)
    tail = opened.read(16)
    length = int.from_bytes(tail[:8], "little")
    if tail[8:] != MAGIC or length > size - HEADER_BYTES - FOOTER_FIXED:
        raise FormatError(file, f"footer at the end, offset {size - 16}, is cut short or damaged")
    start = size - FOOTER_FIXED - length
    opened.seek(start)
    frame = opened.read(FOOTER_FIXED + length)
    if frame[:4] != FOOTER_MAGIC or int.from_bytes(frame[4:8], "little") != length + 48:
        raise FormatError(file, f"offset {start}: no footer frame of {length + 48} bytes")
    index, digest = frame[8 : 8 + length], frame[8 + length : 40 + length]
    if hashlib.sha256(index).digest() != digest:
        raise FormatError(file, f"sha256 of the index, offset {start + 8}, is not the footer's")
    return index, start


def field(entry: object, key: str, kind: type) -> Any:
    """A field of an index object, of the type it must have."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise MalformedError(f"{key} in the index is {value!r:.80} (expected {kind.__name__})")
    return value


def size_field(entry: object, key: str) -> int:
    """A number of bytes or an offset."""
    value: int = field(entry, key, int)
    if not 0 <= value < 1 << 63:
        raise MalformedError(f"{key} in the index is {value}")
    return value


def chunk_bytes_of(fields: dict[str, Any]) -> int:
    """Bytes of a component in one chunk."""
    size = size_field(fields, "chunk_bytes")
    if size == 0 or size % 8 or size > CHUNK_LIMIT:
        raise MalformedError(f"chunk_bytes is {size} (expected a multiple of 8, at most {CHUNK_LIMIT})")
    return size


def parse_tensor(entry: dict[str, Any], chunk_bytes: int) -> tuple[Encoding, list[StoredComponent]]:
    """A tensor of the index; its chunks and frames are counted against encoding, shape and chunk size."""
    declaration = {key: value for key, value in entry.items() if key not in ("name", "components")}
    encoding = encodings.declared(declaration, in_container=True)
    found = field(entry, "components", list)
    wanted = encoding.components()
    if len(found) != len(wanted):
        raise MalformedError(f"{len(found)} components in the index (expected {len(wanted)})")
    stored = []
    for component, fields in zip(wanted, found, strict=True):
        chunks = [parse_chunk(chunk, component.dtype.itemsize) for chunk in field(fields, "chunks", list)]
        expected = -(-byte_count(component.dtype, component.shape) // chunk_bytes)
        if len(chunks) != expected:
            raise MalformedError(f"{len(chunks)} chunks in the index (expected {expected})")
        stored.append(StoredComponent(field(fields, "sha256", str), chunks))
    return encoding, stored


def parse_chunk(fields: object, width: int) -> Chunk:
    """A chunk of the index: a frame for each byte of an element, and one for a mask."""
    mask: bool = field(fields, "mask", bool)
    frames: list[int] = field(fields, "frames", list)
    if len(frames) != width + mask or not all(type(size) is int and 0 < size < 1 << 63 for size in frames):
        raise MalformedError(f"frames in the index are {frames!r:.80} (expected {width + mask} sizes)")
    return Chunk(size_field(fields, "offset"), mask, frames)


def end_of_chunks(stored: list[StoredComponent], position: int) -> int:
    """The offset behind a tensor's chunks, which lie end to end from ``position`` on in any order."""
    chunks = [chunk for component in stored for chunk in component.chunks]
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        if chunk.offset != position:
            raise MalformedError(f"frames overlap or leave a gap at offset {chunk.offset} (expected {position})")
        position += sum(chunk.frames)
    return position


def check_record(opened: BinaryIO, position: int, entry: dict[str, Any], index: bytes, end: int) -> int:
    """Compares a tensor's record with its entry of the index. Returns the offset behind it."""
    if position + 8 > end:
        raise MalformedError(f"offset {position}: no room for a record before the footer")
    opened.seek(position)
    head = opened.read(8)
    length = int.from_bytes(head[4:], "little")
    if head[:4] != RECORD_MAGIC or length > end - position - 8:
        raise MalformedError(f"offset {position}: no record")
    record = opened.read(length)
    # Parsing drops spaces and the order of keys, being a part of the index does not name the tensor.
    try:
        same = record in index and json.loads(record) == entry
    except ValueError:
        same = False
    if not same:
        raise MalformedError(f"offset {position}: the record differs from the index")
    return position + 8 + length


def check_files(fields: dict[str, Any], position: int, end: int) -> None:
    """The frames of files lie end to end between the last record and the footer."""
    files = field(fields, "files", list)
    names = [field(file, "name", str) for file in files]
    if len(set(names)) != len(names):
        raise MalformedError("two files have the same name")
    for name, offset, frame in file_frames(files):
        if offset != position:
            raise MalformedError(f"{name}: frames overlap or leave a gap at offset {offset} (expected {position})")
        position += frame
    if position != end:
        raise MalformedError(f"frames end at offset {position}, the footer begins at {end}")


def file_frames(files: list[object]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of the files' frames, in the order in which they lie."""
    for file in sorted(files, key=lambda file: size_field(file, "offset")):
        yield field(file, "name", str), size_field(file, "offset"), size_field(file, "frame")
