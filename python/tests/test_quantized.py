"""Quantized matrices against the worked examples of docs/FORMATS.md and compressed-tensors, and malformed ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, same_bits
from safetensors.torch import load_file, save_file

import sparsepack
from sparsepack import FormatError, encodings
from sparsepack.encodings import Int, Quantized
from sparsepack.errors import MalformedError
from sparsepack.quantization import schemes

GOLDEN = ROOT / "fixtures/golden/quantized_ct.safetensors"
INT4 = {"encoding": "int", "bits": 4, "group_size": 4, "symmetric": True, "dtype": "BF16", "shape": [2, 8]}
SCALES = torch.tensor([[0.5, 0.25], [1, 2]], dtype=torch.bfloat16)
VALUES = torch.tensor([[0.5, 0, 0, 1, 0, -0.75, 1, 0], [0, 0, 5, 6, 14, 0, 0, 0]], dtype=torch.bfloat16)
Parts = dict[str, torch.Tensor]


def as_bytes(text: str, rows: int | None = None) -> torch.Tensor:
    flat = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
    return flat if rows is None else flat.view(rows, -1)


def decode(declaration: dict[str, Any], parts: Parts) -> torch.Tensor:
    """Decodes components that are what the declaration demands."""
    encoding = encodings.declared(declaration, in_container=True)
    wanted = {component.suffix: (component.dtype, component.shape) for component in encoding.components()}
    assert {suffix: (part.dtype, tuple(part.shape)) for suffix, part in parts.items()} == wanted
    return encoding.decode(parts)


EXAMPLES: dict[str, tuple[dict[str, Any], Parts]] = {
    "all": ({"kept": "all"}, {".codes": as_bytes("01 20 d0 04 00 65 07 00", 2)}),
    "sparse24": (
        {"kept": "sparse24"},
        {".codes": as_bytes("21 4d 65 07", 2), ".metadata": as_bytes("9c 8e", 2)},
    ),
    "bitmask": (
        {"kept": "bitmask", "room": 9},
        {
            ".codes": as_bytes("21 4d 65 07 00"),
            ".mask": as_bytes("69 1c", 2),
            ".offsets": torch.tensor([0, 7]).view(torch.uint64),
        },
    ),
    "nm": (
        {"kept": "nm", "n": 4, "m": 8},
        {".codes": as_bytes("21 4d 50 76", 2), ".mask": as_bytes("69 1d", 2)},
    ),
}


@pytest.mark.parametrize("kept", EXAMPLES)
def test_examples(kept: str) -> None:
    fields, parts = EXAMPLES[kept]
    assert same_bits(decode(INT4 | fields, parts | {".scales": SCALES}), VALUES)


def test_example_with_zero_points() -> None:
    parts = {
        ".codes": as_bytes("21 4d 65 87", 2),
        ".metadata": as_bytes("9c 8e", 2),
        ".scales": SCALES,
        ".zero_points": as_bytes("3f 80", 2),
    }
    expected = torch.tensor([[1, 0, 0, 1.5, 0, -1.5, 0.25, 0], [0, 0, 5, 6, 30, 0, 0, 0]], dtype=torch.bfloat16)
    assert same_bits(decode(INT4 | {"kept": "sparse24", "symmetric": False}, parts), expected)


def test_examples_of_three_bits() -> None:
    expected = torch.tensor([[1.0, 0, -4, 3, -1, 2, 0, -2]])
    fields = {"bits": 3, "group_size": 8, "dtype": "F32", "shape": [1, 8]}
    parts = {".codes": as_bytes("01 77 c1", 1), ".scales": torch.ones(1, 1)}
    assert same_bits(decode(INT4 | fields | {"kept": "all"}, parts), expected)
    parts = {
        ".weight_packed": as_bytes("25 3e 53 00").view(torch.int32).view(1, 1),
        ".weight_scale": torch.ones(1, 1),
        ".weight_shape": torch.tensor([1, 8]),
    }
    assert same_bits(decode(INT4 | fields | {"encoding": "ct-pack-quantized"}, parts), expected)


def golden() -> dict[str, Parts]:
    """Cases of the golden file: what is stored and what it decompresses to."""
    cases: dict[str, Parts] = {}
    for name, tensor in load_file(GOLDEN).items():
        case, _, suffix = name.rpartition(".")
        cases.setdefault(case, {})["." + suffix] = tensor
    return cases


def group_of(case: str) -> dict[str, Any]:
    """The config group that a case's name says."""
    kind, bits, size, symmetry, _ = case.split("-")
    weights = {
        "num_bits": int(bits),
        "type": "float" if kind == "float" else "int",
        "symmetric": symmetry == "sym",
        "strategy": "group" if int(size) else "channel",
        "group_size": int(size) or None,
        "dynamic": False,
    }
    return {"targets": [case], "format": f"{kind}-quantized", "weights": weights, "input_activations": None}


def quantized_config(cases: list[str]) -> dict[str, Any]:
    groups = {f"group_{index}": group_of(case) for index, case in enumerate(cases)}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision",
        "config_groups": groups,
        "ignore": ["lm_head", "re:.*norm"],
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Every golden case as a module of one directory, and a tensor that is not quantized."""
    cases = golden()
    tensors = {
        case + suffix: tensor
        for case, parts in cases.items()
        for suffix, tensor in parts.items()
        if suffix.startswith(".weight")
    }
    write(tmp_path, tensors | {"norm.weight": torch.ones(3)}, quantized_config(list(cases)))
    return tmp_path


def write(path: Path, tensors: Parts, quantization: dict[str, Any]) -> None:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def test_a_directory_decodes_to_what_compressed_tensors_decompresses(directory: Path) -> None:
    checkpoint, read = sparsepack.open_checkpoint(directory), sparsepack.read(directory)
    cases = golden()
    assert read.keys() == {case + ".weight" for case in cases} | {"norm.weight"}
    for case, parts in cases.items():
        assert checkpoint.encodings[case + ".weight"].name == case.split("-")[0] + "-quantized"
        assert same_bits(read[case + ".weight"], parts[".dense"]), case


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several blocks, in every layout, encoded here."""
    monkeypatch.setattr("sparsepack.encodings.base.BLOCK_ELEMENTS", 64 * 16)
    generator = torch.Generator().manual_seed(1)
    for bits in range(2, 9):
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        codes = torch.randint(low, high, (150, 16), generator=generator)
        points = torch.randint(low, high, (150, 2), generator=generator)
        zero = points.repeat_interleave(8, 1)
        rank = torch.rand((150, 2, 8), generator=generator).argsort(-1)
        mask = (rank < 3).view(150, 16)
        scales = torch.rand((150, 2), generator=generator).half()
        declaration = INT4 | {"bits": bits, "group_size": 8, "symmetric": False, "dtype": "F16", "shape": [150, 16]}
        common = {".scales": scales, ".zero_points": packed(points, bits)}
        mask_bytes = (mask.view(150, 2, 8).long() << torch.arange(8)).sum(-1).to(torch.uint8)
        sparse = torch.where(mask, codes, zero)
        bounds = [int(mask[:row].sum()) for row in (0, 64, 128, 150)]
        stream = torch.cat((codes[mask], torch.zeros(5, dtype=torch.int64)))
        for fields, parts, expected in (
            ({"kept": "all"}, {".codes": packed(codes, bits)}, codes),
            (
                {"kept": "nm", "n": 3, "m": 8},
                {".codes": packed(codes[mask].view(150, 6), bits), ".mask": mask_bytes},
                sparse,
            ),
            (
                {"kept": "bitmask", "room": len(stream)},
                {
                    ".codes": packed(stream.unsqueeze(0), bits)[0],
                    ".mask": mask_bytes,
                    ".offsets": torch.tensor(bounds).view(torch.uint64),
                },
                sparse,
            ),
        ):
            value = (scales.double().repeat_interleave(8, 1) * (expected - zero)).half()
            assert same_bits(decode(declaration | fields, parts | common), value + 0.0), (bits, fields)


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of numbers as bits, by way of Python's integers."""
    size = -(-numbers.shape[1] * bits // 8)
    rows = []
    for row in numbers.tolist():
        stream = sum((number & ((1 << bits) - 1)) << (bits * index) for index, number in enumerate(row))
        rows.append(list(stream.to_bytes(size, "little")))
    out = torch.tensor(rows, dtype=torch.uint8)
    return out.view(torch.int8) if bits == 8 else out


def refuses(message: str) -> pytest.RaisesExc[MalformedError]:
    return pytest.raises(MalformedError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("kept", "suffix", "at", "value", "message"),
    [
        ("all", ".scales", (1, 0), -1.0, "row 1, group 0: scale is -1.0 (expected 0 or more)"),
        ("all", ".scales", (1, 0), float("nan"), "row 1, group 0: scale is nan (expected 0 or more)"),
        ("all", ".scales", (1, 1), 3e38, "row 1, column 4: the value is not finite"),
        ("sparse24", ".metadata", (1, 0), 0xE3, "row 1, group 0: illegal nibble 0x3"),
        ("nm", ".mask", (1, 0), 0x0D, "row 1, group 0: mask keeps 3 of 8 (expected 4)"),
        (
            "bitmask",
            ".mask",
            (1, 0),
            0x0C,
            "row 0 and the 63 after it: mask keeps 6 elements (expected 7 by the offsets)",
        ),
        ("bitmask", ".codes", (4,), 0x01, "codes behind the last kept one, 7, are not all zero"),
        ("bitmask", ".codes", (4,), 0x10, "row 0: an unused bit of .codes is set"),
    ],
)
def test_malformed_components(kept: str, suffix: str, at: tuple[int, ...], value: float, message: str) -> None:
    fields, parts = EXAMPLES[kept]
    parts = {name: part.clone() for name, part in (parts | {".scales": SCALES}).items()}
    parts[suffix][at] = value
    with refuses(message):
        decode(INT4 | fields, parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "declared bits is 9 (expected 2 to 8)"),
        ({"group_size": 3}, "8 columns are not whole groups of 3"),
        ({"group_size": 0}, "declared group_size is 0 (expected 1 to 4294967295)"),
        ({"symmetric": 1}, "declared symmetric is 1 (expected true or false)"),
        ({"dtype": "I8"}, "scales are I8 (expected F16, BF16 or F32)"),
        ({"kept": "some"}, "declared kept is 'some' (expected all, sparse24, nm, bitmask)"),
        ({"kept": "nm", "n": 2, "m": 4}, "2:4 is declared as nm (expected sparse24)"),
        ({"kept": "nm", "n": 1, "m": 3}, "8 columns are not whole groups of 3"),
        ({"kept": "bitmask", "room": 17}, "declared room is 17 (expected 0 to 16)"),
        ({"shape": [2, 0]}, "codes of no columns"),
        ({"encoding": "ct-int-quantized"}, "int-quantized codes have 4 bits (expected 8)"),
    ],
)
def test_declarations_are_checked(change: dict[str, Any], message: str) -> None:
    declaration = INT4 | {"kept": "all"} | change
    if declaration["encoding"] != "int":
        del declaration["kept"]
    with refuses(message):
        encodings.declared(declaration, in_container=True)
    assert isinstance(encodings.declared(INT4 | {"kept": "all"}), Int)


def change_tensors(edit: Callable[[Parts], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")

    return change


def change_config(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        edit(config["quantization_config"])
        (path / "config.json").write_text(json.dumps(config))

    return change


PACK = "pack-4-12-asym-bf16"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_tensors(lambda t: t.pop(PACK + ".weight_packed")), "component .weight_packed is not stored"),
        (change_tensors(lambda t: t.pop(PACK + ".weight_scale")), "component .weight_scale is not stored"),
        (change_tensors(lambda t: t.pop(PACK + ".weight_zero_point")), "component .weight_zero_point is not stored"),
        (
            change_tensors(lambda t: t.update({PACK + ".weight_packed": torch.zeros(13, 7, dtype=torch.int32)})),
            ".weight_packed is I32 [13, 7] (expected I32 [13, 8])",
        ),
        (
            change_tensors(lambda t: t.update({PACK + ".weight_g_idx": torch.zeros(60, dtype=torch.int32)})),
            ".weight_g_idx is not a component of pack-quantized",
        ),
        (
            change_tensors(lambda t: t.update({"lm_head.weight_scale": torch.ones(1, 1)})),
            "the module is quantized, but quantization_config.ignore lists it",
        ),
        (
            change_tensors(lambda t: t.update({"other.weight_scale": torch.ones(1, 1)})),
            "no target of quantization_config.config_groups is for the module",
        ),
        (
            change_config(lambda c: c["config_groups"]["group_0"]["targets"].append("norm")),
            "a target of config_groups, but not quantized",
        ),
    ],
)
def test_malformed_directories(directory: Path, change: Callable[[Path], None], problem: str) -> None:
    change(directory)
    with pytest.raises(FormatError) as wrong:
        sparsepack.read(directory)
    assert wrong.value.problem == problem


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda c: c.update(quantization_status="frozen"), "quantization_status is 'frozen' (expected 'compressed')"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "quantization_config.kv_cache_scheme is not supported"),
        (
            lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
            "quantization_config.config_groups.group_0: input_activations is not supported",
        ),
        (
            lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="block"),
            "quantization_config.config_groups.group_0: strategy is 'block' with group_size None "
            "(expected channel or group)",
        ),
        (
            lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="group"),
            "quantization_config.config_groups.group_0: "
            "actorder is 'group' (expected None or False or 'weight' or 'static')",
        ),
        (
            lambda c: c["config_groups"].update(group_9=c["config_groups"]["group_0"]),
            "quantization_config.config_groups.group_9: target 'float-8-0-sym-f16' stands twice",
        ),
        (
            lambda c: c["config_groups"].update(W4A16=["Linear"]),
            "quantization_config.config_groups.W4A16: not an object with targets",
        ),
    ],
)
def test_configurations_that_are_not_read(edit: Callable[[dict[str, Any]], object], problem: str) -> None:
    config = quantized_config(["float-8-0-sym-f16"])
    schemes(config)
    edit(config)
    with refuses(problem):
        schemes(config)


def test_targets_come_by_name_then_expression_then_class() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "channel"}}

    groups = {"a": group(2, "Linear"), "b": group(3, r"re:layers\.\d+\.m", "re:z"), "c": group(4, "layers.1.m")}
    found = schemes(
        {
            "quantization_status": "compressed",
            "format": "pack-quantized",
            "config_groups": groups,
            "ignore": ["re:.*head"],
        }
    )
    bits = [found.of(module).grid.bits for module in ("layers.1.m", "layers.12.mlp", "model.layers.1.m", "other")]
    assert bits == [4, 3, 2, 2]
    with refuses("the module is quantized, but quantization_config.ignore lists it"):
        found.of("lm_head")


def test_a_weight_by_itself() -> None:
    case = golden()["int-8-12-asym-f16"]
    grid = {"bits": 8, "group_size": 12, "symmetric": False, "dtype": "F16", "shape": [13, 60]}
    declaration = {"encoding": "ct-int-quantized", **grid}
    encoding = encodings.declared(declaration, in_container=True)
    assert isinstance(encoding, Quantized)
    assert same_bits(encoding.decode(case), case[".dense"])
