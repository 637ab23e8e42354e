"""``model.spz``: the document's example, and containers that are damaged or built wrong."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from conftest import same_bits

import sparsepack
from sparsepack import FormatError

W = torch.tensor([[1, 0, 0, 2, 0, -3, 4, 0], [0, 0, 5, 6, 7, 0, 0, 0]], dtype=torch.bfloat16)
MASK = bytes.fromhex("69 1c")
PLANES = [bytes.fromhex("7f 80 80 81 81 81 81"), bytes.fromhex("00 00 81 00 40 80 c0")]
Entry = dict[str, Any]


def frame(data: bytes, **options: Any) -> bytes:
    parameters: dict[str, Any] = {"write_checksum": True, "write_content_size": True} | options
    return zstandard.ZstdCompressor(level=3, **parameters).compress(data)


def skippable(magic: int, data: bytes) -> bytes:
    return bytes([magic]) + bytes.fromhex("2a4d18") + len(data).to_bytes(4, "little") + data


def dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def example() -> tuple[list[bytes], Entry]:
    """Frames and entry of the document's example, which begins behind the header."""
    frames = [frame(part) for part in (MASK, *PLANES)]
    bits = W.contiguous().view(torch.uint8).numpy().tobytes()
    chunk = {"offset": 24, "mask": True, "frames": [len(part) for part in frames]}
    component = {"sha256": hashlib.sha256(bits).hexdigest(), "chunks": [chunk]}
    return frames, {"name": "W", "encoding": "dense", "dtype": "BF16", "shape": [2, 8], "components": [component]}


def write(directory: Path, frames: list[bytes], entry: Entry, **changes: Any) -> Path:
    """A container of one tensor. ``changes``: header, record, index, digest or files instead of the right ones."""
    header = skippable(0x5A, b"SPARSEPK" + (1).to_bytes(4, "little") + bytes(4))
    index = changes.get("index", {"chunk_bytes": 2 << 20, "tensors": [entry], "files": changes.get("files", [])})
    text = index if isinstance(index, bytes) else dumps(index)
    digest = changes.get("digest", hashlib.sha256(text).digest())
    footer = skippable(0x5C, text + digest + len(text).to_bytes(8, "little") + b"SPARSEPK")
    record = skippable(0x5B, changes.get("record", dumps(entry)))
    content = changes.get("header", header) + b"".join(frames) + record + changes.get("gap", b"") + footer
    (directory / "model.spz").write_bytes(content)
    return directory


def refuses(directory: Path, tensor: str | None, problem: str) -> None:
    with pytest.raises(FormatError, match=re.escape(problem)) as caught:
        sparsepack.read(directory)
    assert (caught.value.tensor, caught.value.problem) == (tensor, problem)


def test_example(tmp_path: Path) -> None:
    frames, entry = example()
    assert [len(part) for part in frames] == [15, 20, 20]
    # The checksum of each frame is its last four bytes.
    assert frames[0][:-4] == bytes.fromhex("28 b5 2f fd 24 02 11 00 00 69 1c")
    assert frames[1][:-4] == bytes.fromhex("28 b5 2f fd 24 07 39 00 00 7f 80 80 81 81 81 81")
    assert same_bits(sparsepack.read(write(tmp_path, frames, entry))["W"], W)
    assert (tmp_path / "model.spz").read_bytes()[79:87] == bytes.fromhex("5b 2a 4d 18 d2 00 00 00")


@pytest.mark.parametrize("dtype", ["BOOL", "I8", "U8", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "I64", "F64"])
@pytest.mark.parametrize("mask", [False, True])
def test_types_and_chunks(tmp_path: Path, dtype: str, mask: bool) -> None:
    """Chunks of 16 bytes of random bits, encoded element by element as the document says."""
    torch_dtype = sparsepack.dtypes.DTYPES[dtype]
    width = torch_dtype.itemsize
    generator = torch.Generator().manual_seed(width)
    high = 2 if dtype == "BOOL" else 256
    data = torch.randint(0, high, (11 * width,), generator=generator, dtype=torch.uint8).view(-1, width)
    data[torch.rand(11, generator=generator) < 0.4] = 0
    values = [int.from_bytes(bytes(element), "little") for element in data.tolist()]
    frames: list[bytes] = []
    chunks = []
    for start in range(0, 11, 16 // width):
        part = values[start : start + 16 // width]
        parts = []
        if mask:
            bits = sum((value != 0) << place for place, value in enumerate(part))
            parts.append(frame(bits.to_bytes(-(-len(part) // 8), "little")))
            part = [value for value in part if value]
        if dtype in ("F16", "BF16", "F32", "F64"):
            part = [(value << 1 | value >> (8 * width - 1)) & ((1 << 8 * width) - 1) for value in part]
        parts += [frame(bytes(value >> 8 * plane & 255 for value in part)) for plane in reversed(range(width))]
        chunks.append({"offset": 24 + sum(map(len, frames)), "mask": mask, "frames": [len(part) for part in parts]})
        frames += parts
    component = {"sha256": hashlib.sha256(data.numpy().tobytes()).hexdigest(), "chunks": chunks}
    entry = {"name": "t", "encoding": "dense", "dtype": dtype, "shape": [11], "components": [component]}
    write(tmp_path, frames, entry, index={"chunk_bytes": 16, "tensors": [entry], "files": []})
    assert same_bits(sparsepack.read(tmp_path)["t"], data.flatten().view(torch_dtype))


def test_a_tensor_without_bytes(tmp_path: Path) -> None:
    component = {"sha256": hashlib.sha256(b"").hexdigest(), "chunks": []}
    entry = {"name": "e", "encoding": "dense", "dtype": "F32", "shape": [0, 3], "components": [component]}
    assert sparsepack.read(write(tmp_path, [], entry))["e"].shape == (0, 3)


def test_another_version(tmp_path: Path) -> None:
    header = skippable(0x5A, b"SPARSEPK" + (2).to_bytes(4, "little") + bytes(4))
    refuses(write(tmp_path, *example(), header=header), None, "container version 2 (expected 1)")


def test_another_magic(tmp_path: Path) -> None:
    header = skippable(0x5A, b"SPARSEKP" + (1).to_bytes(4, "little") + bytes(4))
    refuses(write(tmp_path, *example(), header=header), None, "does not start with the header of a container")


@pytest.mark.parametrize("cut", [1, 8, 16, 60, 200])
def test_a_truncated_container(tmp_path: Path, cut: int) -> None:
    file = write(tmp_path, *example()) / "model.spz"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(FormatError, match="footer"):
        sparsepack.read(tmp_path)


def test_a_bad_digest_of_the_index(tmp_path: Path) -> None:
    write(tmp_path, *example(), digest=bytes(32))
    refuses(tmp_path, None, "sha256 of the index, offset 305, is not the footer's")


def test_a_bad_digest_of_a_component(tmp_path: Path) -> None:
    frames, entry = example()
    entry["components"][0]["sha256"] = "0" * 64
    refuses(write(tmp_path, frames, entry), "W", f"sha256 of the decoded bytes is not {'0' * 64}")


def test_a_damaged_frame(tmp_path: Path) -> None:
    frames, entry = example()
    frames[1] = frames[1][:10] + b"\0" + frames[1][11:]
    with pytest.raises(FormatError, match=r"model\.spz: W: offset 39: frame is damaged: "):
        sparsepack.read(write(tmp_path, frames, entry))


def resized(frames: list[bytes], entry: Entry) -> tuple[list[bytes], Entry]:
    entry["components"][0]["chunks"][0]["frames"] = [len(part) for part in frames]
    return frames, entry


@pytest.mark.parametrize(
    ("data", "options", "problem"),
    [
        (PLANES[0][:-1], {}, "offset 39: frame states 6 bytes (expected 7 bytes)"),
        (bytes(1 << 20), {}, "offset 39: frame states 1048576 bytes (expected 7 bytes)"),
        (PLANES[0], {"write_content_size": False}, "offset 39: frame states no size (expected 7 bytes)"),
        (PLANES[0], {"write_checksum": False}, "offset 39: frame has no checksum"),
    ],
)
def test_frames_of_another_kind(tmp_path: Path, data: bytes, options: dict[str, Any], problem: str) -> None:
    frames, entry = example()
    frames[1] = frame(data, **options)
    refuses(write(tmp_path, *resized(frames, entry)), "W", problem)


def test_unused_bits_of_a_mask(tmp_path: Path) -> None:
    frames, entry = example()
    frames[0], entry["shape"] = frame(bytes.fromhex("69 9c")), [1, 15]
    refuses(write(tmp_path, *resized(frames, entry)), "W", "offset 24: an unused bit of the mask is set")


def test_a_record_that_differs(tmp_path: Path) -> None:
    frames, entry = example()
    other = dumps(entry | {"name": "V"})
    refuses(write(tmp_path, frames, entry, record=other), "W", "offset 79: the record differs from the index")


def test_a_record_that_is_a_part_of_the_entry(tmp_path: Path) -> None:
    frames, entry = example()
    part = dumps(entry["components"][0])
    refuses(write(tmp_path, frames, entry, record=part), "W", "offset 79: the record differs from the index")


def test_a_gap(tmp_path: Path) -> None:
    refuses(write(tmp_path, *example(), gap=bytes(8)), None, "frames end at offset 297, the footer begins at 305")


def test_a_file_frame_elsewhere(tmp_path: Path) -> None:
    file = {"name": "config.json", "bytes": 2, "head": 2, "sha256": "", "offset": 24, "frame": 8}
    problem = "config.json: frames overlap or leave a gap at offset 24 (expected 297)"
    refuses(write(tmp_path, *example(), gap=bytes(8), files=[file]), None, problem)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda e: e["components"].append(e["components"][0]), "2 components in the index (expected 1)"),
        (lambda e: e["components"][0].update(chunks=[]), "0 chunks in the index (expected 1)"),
        (
            lambda e: e["components"][0]["chunks"][0].update(frames=[15, 20]),
            "frames in the index are [15, 20] (expected 3 sizes)",
        ),
        (
            lambda e: e["components"][0]["chunks"][0].update(offset=25),
            "frames overlap or leave a gap at offset 25 (expected 24)",
        ),
        (lambda e: e.update(shape=[2**40, 2**40]), "1 components"),
        (lambda e: e.update(encoding="gzip"), "unknown encoding 'gzip'"),
        (lambda e: e["components"][0].update(sha256=7), "sha256 in the index is 7 (expected str)"),
    ],
)
def test_malformed_entries(tmp_path: Path, edit: Callable[[Entry], None], problem: str) -> None:
    frames, entry = example()
    edit(entry)
    if entry["shape"][0] > 2:
        problem = f"1 chunks in the index (expected {2**81 // (2 << 20)})"
    refuses(write(tmp_path, frames, entry), "W", problem)


def test_names_that_stand_twice(tmp_path: Path) -> None:
    frames, entry = example()
    index = {"chunk_bytes": 2 << 20, "tensors": [entry, entry], "files": []}
    refuses(write(tmp_path, frames, entry, index=index), "W", "two tensors have this name")


@pytest.mark.parametrize("size", [0, 12, 65 << 20, "8"])
def test_chunk_sizes(tmp_path: Path, size: object) -> None:
    frames, entry = example()
    write(tmp_path, frames, entry, index={"chunk_bytes": size, "tensors": [entry], "files": []})
    with pytest.raises(FormatError, match="chunk_bytes"):
        sparsepack.read(tmp_path)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Whatever byte of a container is wrong, reading fails: nothing but a FormatError, never other values."""
    content = (write(tmp_path, *example()) / "model.spz").read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        (tmp_path / "model.spz").write_bytes(damaged)
        with pytest.raises(FormatError):
            sparsepack.read(tmp_path)


def test_without_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *example())
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsepack\[zst\]'"):
        sparsepack.read(tmp_path)
