"""Decoders against the worked examples of docs/FORMATS.md, against torch, and on malformed components."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import same_bits
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsepack import encodings
from sparsepack.encodings import bitmask, compressed_tensors, nm, sparse24, torch_cutlass
from sparsepack.errors import MalformedError

W = torch.tensor([[1, 0, 0, 2, 0, -3, 4, 0], [0, 0, 5, 6, 7, 0, 0, 0]], dtype=torch.bfloat16)


def as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def refuses(message: str) -> pytest.RaisesExc[MalformedError]:
    return pytest.raises(MalformedError, match=f"^{re.escape(message)}$")


def random_24(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """A 2:4 matrix without -0.0, some of whose groups hold fewer than two values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-100, 100, (rows, columns), generator=generator)
    rank = torch.rand((rows, columns // 4, 4), generator=generator).argsort(-1).argsort(-1)
    return (values * (rank < 2).view(rows, columns)).to(dtype)


# sparse24


def test_sparse24_example() -> None:
    values = as_bytes("80 3f 00 40 40 c0 80 40 a0 40 c0 40 e0 40 00 00").view(torch.bfloat16).view(2, 4)
    assert same_bits(sparse24.decode(values, as_bytes("9c 8e").view(2, 1)), W)


def test_sparse24_keeps_every_bit() -> None:
    # -0.0, a signalling NaN, the smallest subnormal and an infinity.
    bits = torch.tensor([[-0x8000, 0x7F81, 0x0001, -0x0080]], dtype=torch.int16)
    out = sparse24.decode(bits.view(torch.bfloat16), as_bytes("c4").view(1, 1))
    assert out.view(torch.int16).tolist() == [[-0x8000, 0x7F81, 0, 0, 0x0001, 0, 0, -0x0080]]


def test_sparse24_of_an_odd_number_of_groups() -> None:
    out = sparse24.decode(torch.tensor([[1.0, 2.0]]), as_bytes("e9").view(1, 1))
    assert out.tolist() == [[0, 1, 2, 0]]


def test_sparse24_padding_is_checked() -> None:
    with refuses("row 1: unused nibble is 0x4 (expected 0xe)"):
        sparse24.decode(torch.ones(2, 2), as_bytes("e9 49").view(2, 1))


@pytest.mark.parametrize("nibble", [0x0, 0x1, 0x2, 0x3, 0x5, 0x6, 0x7, 0xA, 0xB, 0xF])
def test_sparse24_illegal_nibbles(nibble: int) -> None:
    metadata = torch.tensor([[0xEE], [0x0E | nibble << 4]], dtype=torch.uint8)
    with refuses(f"row 1, group 1: illegal nibble {nibble:#x}"):
        sparse24.decode(torch.ones(2, 4), metadata)
    with refuses(f"row 1, group 1: illegal nibble {nibble:#x}"):
        sparse24.check(metadata, 2)


def test_rows_are_named_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepack.encodings.base.BLOCK_ELEMENTS", 16)
    metadata = torch.full((9, 1), 0xEE, dtype=torch.uint8)
    assert sparse24.decode(torch.ones(9, 4), metadata).sum() == 36
    metadata[7] = 0xE5
    with refuses("row 7, group 0: illegal nibble 0x5"):
        sparse24.decode(torch.ones(9, 4), metadata)


# nm


def nm_example() -> tuple[torch.Tensor, torch.Tensor]:
    values = as_bytes("80 3f 00 40 40 40 80 40 00 00 a0 40").view(torch.bfloat16).view(2, 3)
    return values, as_bytes("62 00 09 01").view(2, 2)


def test_nm_example() -> None:
    out = nm.decode(*nm_example(), columns=9, n=1, m=3)
    assert out.tolist() == [[0, 1, 0, 0, 0, 2, 3, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0, 5]]


def test_nm_counts_are_checked() -> None:
    values, mask = nm_example()
    mask[1, 0] = 0x0B
    with refuses("row 1, group 0: mask keeps 2 of 3 (expected 1)"):
        nm.decode(values, mask, columns=9, n=1, m=3)


def test_nm_unused_bits_are_checked() -> None:
    values, mask = nm_example()
    mask[1, 1] = 0x03
    with refuses("row 1: an unused mask bit is set"):
        nm.decode(values, mask, columns=9, n=1, m=3)


# bitmask


def bitmask_example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = as_bytes("80 3f 00 40 40 40 80 40 00 00").view(torch.bfloat16)
    return values, as_bytes("09 14").view(2, 1), torch.tensor([0, 4]).view(torch.uint64)


def test_bitmask_example() -> None:
    assert bitmask.decode(*bitmask_example(), columns=5).tolist() == [[1, 0, 0, 2, 0], [0, 0, 3, 0, 4]]


def test_bitmask_of_several_stripes_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepack.encodings.base.BLOCK_ELEMENTS", 64 * 8)
    matrix = torch.rand(150, 8) * (torch.rand(150, 8) < 0.5)
    kept = matrix != 0
    mask = (kept.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, keepdim=True).to(torch.uint8)
    counts = kept.sum(1)
    offsets = torch.tensor([0, counts[:64].sum(), counts[:128].sum(), counts.sum()])
    out = bitmask.decode(matrix[kept], mask, offsets.view(torch.uint64), columns=8)
    assert same_bits(out, matrix)
    offsets[2] += 1
    with refuses(
        f"row 64 and the 63 after it: mask keeps {counts[64:128].sum()} elements "
        f"(expected {counts[64:128].sum() + 1} by the offsets)"
    ):
        bitmask.decode(matrix[kept], mask, offsets.view(torch.uint64), columns=8)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 4], "first offset is 1 (expected 0)"),
        ([0, 6], "offset 1 is 6 (expected 0 to 5)"),
        ([0, -1], "offset 1 is -1 (expected 0 to 5)"),
        ([0, 5], "row 0 and the 63 after it: mask keeps 4 elements (expected 5 by the offsets)"),
    ],
)
def test_bitmask_offsets_are_checked(offsets: list[int], message: str) -> None:
    values, mask, _ = bitmask_example()
    with refuses(message):
        bitmask.decode(values, mask, torch.tensor(offsets).view(torch.uint64), columns=5)


def test_bitmask_values_behind_the_last_are_zero() -> None:
    values, mask, offsets = bitmask_example()
    values[4] = 1
    with refuses("values behind the last kept element, 4, are not all zero"):
        bitmask.decode(values, mask, offsets, columns=5)


# torch-cutlass


def test_torch_cutlass_example() -> None:
    packed = torch.zeros(32, 32, dtype=torch.float16)
    packed[9, 8:16] = torch.tensor([1, 2, -3, 4, 5, 6, 7, 0], dtype=torch.float16)
    meta = torch.full((32 * 4 * 2,), 0xEE, dtype=torch.uint8)
    meta[22], meta[23] = 0x9C, 0x8E
    out = torch_cutlass.decode(packed, meta.view(torch.int16).view(32, 4))
    expected = torch.zeros(32, 64, dtype=torch.float16)
    expected[9, 16:32] = W.flatten().half()
    assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("rows", "columns"), [(32, 128), (96, 256), (64, 384)])
def test_torch_cutlass_is_torchs(dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_24(rows, columns, dtype)
    packed, meta = sparse_semi_structured_from_dense_cutlass(matrix)
    assert same_bits(torch_cutlass.decode(packed, meta), matrix)
    torch_cutlass.check(meta, dtype)
    monkeypatch.setattr("sparsepack.encodings.base.BLOCK_ELEMENTS", 5 * columns)
    assert same_bits(torch_cutlass.decode(packed, meta), matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_sparse24_metadata_becomes_torchs(dtype: torch.dtype) -> None:
    matrix = random_24(64, 256, dtype)
    packed, meta = sparse_semi_structured_from_dense_cutlass(matrix)
    nibbles = row_major_nibbles(matrix)
    assert same_bits(sparse24.decode(packed, nibbles), matrix)
    assert same_bits(torch_cutlass.meta_of(nibbles, dtype), meta)


def row_major_nibbles(matrix: torch.Tensor) -> torch.Tensor:
    """Metadata of ``sparse24``, from the table of fillers in the document."""
    fillers = {0: 0xE, 1: 0x8, 2: 0x9, 4: 0xE, 8: 0xE, 3: 0x4, 5: 0x8, 9: 0xC, 6: 0x9, 10: 0xD, 12: 0xE}
    flags = (matrix.view(matrix.shape[0], -1, 4) != 0).long() @ torch.tensor([1, 2, 4, 8])
    nibble = torch.tensor([fillers.get(flag, 0) for flag in range(16)], dtype=torch.uint8)[flags]
    return nibble[:, ::2] | nibble[:, 1::2] << 4


def test_torch_cutlass_illegal_nibbles() -> None:
    packed, meta = sparse_semi_structured_from_dense_cutlass(random_24(32, 64, torch.float16))
    meta.view(-1)[11] = 0x8E95 - 0x10000  # word (9, 1), by the document's example
    with refuses("row 9, group 4: illegal nibble 0x5"):
        torch_cutlass.decode(packed, meta)
    with refuses("metadata has an illegal nibble"):
        torch_cutlass.check(meta, torch.float16)


# compressed-tensors


def test_sparse_24_bitmask_example() -> None:
    compressed = torch.tensor([[1, 2, -3, 4], [5, 6, 7, 0]], dtype=torch.bfloat16)
    bits = as_bytes("69 5c").view(2, 1)
    assert same_bits(compressed_tensors.decode_24(compressed, bits), W)
    bits[1] = 0x1C
    with refuses("row 1, group 1: bitmask keeps 1 of 4 (expected 2)"):
        compressed_tensors.decode_24(compressed, bits)


@pytest.mark.parametrize(
    ("values", "bits"), [([1, 2, -3, 4, 5, 6, 7], "69 1c"), ([1, 2, -3, 4, 0, 0, 5, 6, 7], "69 1f")]
)
def test_sparse_bitmask_examples(values: list[int], bits: str) -> None:
    compressed = torch.tensor(values, dtype=torch.bfloat16)
    out = compressed_tensors.decode_bitmask(compressed, as_bytes(bits).view(2, 1), torch.tensor([0, 4]), 8)
    assert same_bits(out, W)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3], "row 0: bitmask keeps 4 elements (expected 3 by the offsets)"),
        ([0, 5], "row 0: bitmask keeps 4 elements (expected 5 by the offsets)"),
        ([1, 4], "row 0: offset is 1 (expected 0)"),
    ],
)
def test_sparse_bitmask_offsets_are_checked(offsets: list[int], message: str) -> None:
    with refuses(message):
        compressed_tensors.decode_bitmask(torch.ones(7), as_bytes("69 1c").view(2, 1), torch.tensor(offsets), columns=8)


def test_sparse_bitmask_needs_all_its_values() -> None:
    with refuses("row 1: bitmask keeps 3 elements (expected 4 by the offsets)"):
        compressed_tensors.decode_bitmask(torch.ones(8), as_bytes("69 1c").view(2, 1), torch.tensor([0, 4]), columns=8)


# Declarations


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"encoding": "sparse25", "dtype": "BF16", "shape": [2, 8]}, "unknown encoding 'sparse25'"),
        ({"encoding": "dense", "dtype": "BF16", "shape": [2, 8]}, "unknown encoding 'dense'"),
        ({"encoding": "sparse24", "dtype": "BF17", "shape": [2, 8]}, "unknown element type 'BF17'"),
        ({"encoding": "sparse24", "dtype": "F64", "shape": [2, 8]}, "element type torch.float64 cannot be packed"),
        ({"encoding": "sparse24", "dtype": "F32", "shape": [2, 6]}, "6 columns are not whole groups of 4"),
        ({"encoding": "sparse24", "dtype": "F32", "shape": [8]}, "declared shape [8] is not a matrix"),
        ({"encoding": "sparse24", "dtype": "F32", "shape": [2, -8]}, "shape is [2, -8] (expected a list of sizes)"),
        ({"encoding": "sparse24", "dtype": "F32", "shape": [2, True]}, "shape is [2, True] (expected a list of sizes)"),
        ({"encoding": "nm", "dtype": "F32", "shape": [2, 8], "n": 8, "m": 8}, "declared n is 8 (expected 1 to 7)"),
        ({"encoding": "nm", "dtype": "F32", "shape": [2, 8], "n": 1, "m": 17}, "declared m is 17 (expected 2 to 16)"),
        (
            {"encoding": "nm", "dtype": "F32", "shape": [2, 8], "n": 2, "m": 4},
            "2:4 is declared as nm (expected sparse24)",
        ),
        ({"encoding": "nm", "dtype": "F32", "shape": [2, 8], "n": 1, "m": 3}, "8 columns are not whole groups of 3"),
        (
            {"encoding": "bitmask", "dtype": "F32", "shape": [2, 8], "kept": 17},
            "declared kept is 17 (expected 0 to 16)",
        ),
        (
            {"encoding": "torch-cutlass", "dtype": "F32", "shape": [32, 64]},
            "F32 has no CUTLASS layout (F16, BF16 and I8 have)",
        ),
        (
            {"encoding": "torch-cutlass", "dtype": "F16", "shape": [32, 96]},
            "shape [32, 96] is not in multiples of [32, 64], which the CUTLASS layout needs",
        ),
        (
            {"encoding": "nm", "dtype": "F32", "shape": [2, 8], "n": 1},
            "declaration has keys ['dtype', 'encoding', 'n', 'shape'] "
            "(expected ['dtype', 'encoding', 'm', 'n', 'shape'])",
        ),
    ],
)
def test_declarations_are_checked(declaration: dict[str, object], message: str) -> None:
    with refuses(message):
        encodings.declared(declaration)
