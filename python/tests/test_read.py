"""Directories of every format, as the binary writes them, against their dense twins; and damaged ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OUTPUTS, QUANTIZED, run, same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsepack
from sparsepack import FormatError
from sparsepack.encodings import Int

Make = Callable[[str], Path]
UP = "model.layers.0.mlp.up_proj.weight"

# How the pruned linears of each output are stored.
STORED = {
    "plain": "dense",
    "nm-4-8": "nm",
    "nm-2-16-f32": "nm",
    "sparse24-f16": "sparse24",
    "sparse24-f8": "sparse24",
    "zst": "dense",
    "zst-dense": "dense",
    "f8": "dense",
    "int4": "int",
    "int4-24": "int",
    "int4-nm": "int",
    "int4-bitmask": "int",
    "int3-asymmetric": "int",
    "int8": "int",
    "int4-gptq": "int",
    "pack-quantized-24": "pack-quantized",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_read_is_the_dense_directory(name: str, packed: Make, dense: Make) -> None:
    checkpoint = sparsepack.open_checkpoint(packed(name))
    assert checkpoint.encodings[UP].name == STORED.get(name, name)
    read, expected = sparsepack.read(packed(name)), load_file(dense(name) / "model.safetensors")
    assert read.keys() == expected.keys()
    wrong = [key for key in expected if not same_bits(read[key], expected[key])]
    assert not wrong


def test_iterate_decodes_one_tensor_at_a_time(packed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    real = sparsepack.Checkpoint.dense

    def counted(self: sparsepack.Checkpoint, name: str) -> torch.Tensor:
        decoded.append(name)
        return real(self, name)

    monkeypatch.setattr(sparsepack.Checkpoint, "dense", counted)
    tensors = sparsepack.iterate(packed("sparse24"))
    names = [next(tensors)[0], next(tensors)[0]]
    assert decoded == names


@pytest.mark.parametrize(
    ("name", "kept", "bits", "group_size"),
    [
        ("int4", "all", 4, 32),
        ("int4-24", "sparse24", 4, 32),
        ("int4-nm", "nm", 4, 32),
        ("int4-bitmask", "bitmask", 4, 32),
        ("int3-asymmetric", "all", 3, 32),
        ("int8", "all", 8, None),
        ("int4-gptq", "all", 4, 64),
    ],
)
def test_codes_are_stored_as_asked(name: str, kept: str, bits: int, group_size: int | None, packed: Make) -> None:
    encodings = sparsepack.open_checkpoint(packed(name)).encodings
    linears = [encodings[key] for key in encodings if key.endswith("_proj.weight")]
    assert len(linears) == 28
    for encoding in linears:
        assert isinstance(encoding, Int)
        assert (encoding.kept, encoding.grid.bits, encoding.grid.group_size) == (kept, bits, group_size)
        assert encoding.grid.symmetric == (name != "int3-asymmetric")


@pytest.mark.parametrize(("name", "twin"), [("int4", "pack-quantized"), ("int8", "int-quantized")])
def test_a_grid_has_the_same_values_in_every_format(name: str, twin: str, packed: Make) -> None:
    read, expected = sparsepack.read(packed(name)), sparsepack.read(packed(twin))
    assert read.keys() == expected.keys()
    assert all(same_bits(read[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["int4-24", "int3-asymmetric", "pack-quantized", "float-quantized"])
def test_a_dense_conversion_is_what_unpack_gives(name: str, packed: Make, dense: Make, tmp_path: Path) -> None:
    run("convert", packed(name), "-o", tmp_path / "dense", "--format", "safetensors")
    converted, unpacked = (load_file(path / "model.safetensors") for path in (tmp_path / "dense", dense(name)))
    assert converted.keys() == unpacked.keys()
    assert all(same_bits(converted[key], unpacked[key]) for key in unpacked)


@pytest.mark.parametrize(
    "name",
    ["sparse24", "nm-4-8", "bitmask", "torch-cutlass", "sparse-24-bitmask", "sparse-bitmask", *QUANTIZED],
)
def test_an_archive_keeps_the_encodings(name: str, packed: Make, tmp_path: Path) -> None:
    run("convert", packed(name), "-o", tmp_path / "archive", "--format", "zst")
    archive, directory = (sparsepack.open_checkpoint(path) for path in (tmp_path / "archive", packed(name)))
    assert {key: value.name for key, value in archive.encodings.items()} == {
        key: value.name for key, value in directory.encodings.items()
    }
    read, expected = dict(archive), dict(directory)
    assert read.keys() == expected.keys()
    assert all(same_bits(read[key], expected[key]) for key in expected)
    run("unpack", tmp_path / "archive", "-o", tmp_path / "restored")
    restored, file = (path / "model.safetensors" for path in (tmp_path / "restored", packed(name)))
    assert restored.read_bytes() == file.read_bytes()


def sharded(directory: Path) -> dict[str, str]:
    """Splits model.safetensors in two, components of a tensor together. Returns the weight map."""
    tensors = load_file(directory / "model.safetensors")
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        declared = json.loads(file.metadata()["sparsepack.encodings"])
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {}
    for number, name in enumerate(names):
        part = {key: value for key, value in tensors.items() if (".layers.0." in key) == (number == 0)}
        mine = {key: value for key, value in declared.items() if (".layers.0." in key) == (number == 0)}
        save_file(part, directory / name, {"format": "pt", "sparsepack.encodings": json.dumps(mine)})
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors").unlink()
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(copy: Make, packed: Make) -> None:
    directory = copy("sparse24")
    sharded(directory)
    read, expected = sparsepack.read(directory), sparsepack.read(packed("sparse24"))
    assert read.keys() == expected.keys()
    assert all(same_bits(read[key], expected[key]) for key in expected)


def test_index_and_shards_must_agree(copy: Make) -> None:
    directory = copy("sparse24")
    weight_map = sharded(directory)
    del weight_map["model.norm.weight"]
    write_index(directory, weight_map)
    refuses(directory, "model.norm.weight", "the index says nothing, but it is in model-00002-of-00002.safetensors")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "..", "a/b"])
def test_shards_are_plain_names(copy: Make, shard: str) -> None:
    directory = copy("sparse24")
    weight_map = sharded(directory)
    write_index(directory, weight_map | {"x": shard})
    refuses(directory, None, f"shard {shard!r} in the index is not a plain file name")


def refuses(directory: Path, tensor: str | None, problem: str) -> None:
    """Reading fails with this tensor and message."""
    with pytest.raises(FormatError, match=re.escape(problem)) as caught:
        sparsepack.read(directory)
    assert (caught.value.tensor, caught.value.problem) == (tensor, problem)
    assert str(directory) in str(caught.value)


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Writes model.safetensors again after an edit of its tensors and declarations."""
    file = directory / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    declared = json.loads(metadata.get("sparsepack.encodings", "{}"))
    edit(tensors, declared)
    save_file(tensors, file, metadata | {"sparsepack.encodings": json.dumps(declared)})


def test_an_illegal_nibble_names_the_tensor(copy: Make) -> None:
    directory = copy("sparse24")
    change(directory, lambda tensors, _: tensors[UP + ".metadata"][3, 2:3].fill_(0xE0))
    refuses(directory, UP, "row 3, group 4: illegal nibble 0x0")


def test_a_wrong_count_names_the_tensor(copy: Make) -> None:
    directory = copy("nm-4-8")
    change(directory, lambda tensors, _: tensors[UP + ".mask"][5, 1:2].fill_(0x3F))
    refuses(directory, UP, "row 5, group 1: mask keeps 6 of 8 (expected 4)")


def test_a_missing_component(copy: Make) -> None:
    directory = copy("sparse24")
    change(directory, lambda tensors, _: tensors.__delitem__(UP + ".metadata"))
    refuses(directory, UP, "component .metadata is not stored")


def test_a_component_of_another_shape(copy: Make) -> None:
    directory = copy("sparse24")

    def edit(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        tensors[UP + ".metadata"] = tensors[UP + ".metadata"][:, :-1].contiguous()

    change(directory, edit)
    refuses(directory, UP, ".metadata is U8 [384, 15] (expected U8 [384, 16])")


@pytest.mark.parametrize("suffix", ["", ".mask"])
def test_neighbours_of_components(copy: Make, suffix: str) -> None:
    directory = copy("sparse24")
    change(directory, lambda tensors, _: tensors.update({UP + suffix: torch.zeros(1)}))
    refuses(directory, UP, f"{UP}{suffix} is stored beside its components")


def test_an_unknown_encoding(copy: Make) -> None:
    directory = copy("sparse24")
    change(directory, lambda _, declared: declared[UP].update(encoding="sparse99"))
    refuses(directory, UP, "unknown encoding 'sparse99'")


def header_bytes(header: str) -> bytes:
    data = header.encode()
    return len(data).to_bytes(8, "little") + data


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    (tmp_path / "model.safetensors").write_bytes(header_bytes(f"{{{entry}, {entry}}}") + b"\0")
    refuses(tmp_path, None, "header has the key 'a' twice")


def test_a_truncated_file(copy: Make) -> None:
    directory = copy("sparse24")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError):
        sparsepack.read(directory)


def test_two_checkpoints_in_a_directory(copy: Make) -> None:
    directory = copy("sparse24")
    (directory / "model.spz").write_bytes(b"")
    refuses(directory, None, "model.spz and model.safetensors in the directory (expected one of them)")


def test_an_empty_directory(tmp_path: Path) -> None:
    refuses(
        tmp_path, None, "no model.safetensors, index of shards or model.spz in the directory (expected one of them)"
    )


# compressed-tensors

MODULE = UP.removesuffix(".weight")


def test_legacy_component_is_missing(copy: Make) -> None:
    directory = copy("sparse-24-bitmask")
    change(directory, lambda tensors, _: tensors.__delitem__(MODULE + ".bitmask"))
    refuses(directory, UP, f"{MODULE}.bitmask is not stored")


def test_legacy_weight_beside_its_components(copy: Make) -> None:
    directory = copy("sparse-bitmask")
    change(directory, lambda tensors, _: tensors.update({UP: torch.zeros(384, 128)}))
    refuses(directory, UP, f"{UP} is stored beside its components")


def test_legacy_shape_disagrees(copy: Make) -> None:
    directory = copy("sparse-24-bitmask")
    change(directory, lambda tensors, _: tensors[MODULE + ".shape"].fill_(384))
    refuses(directory, UP, ".compressed is BF16 [384, 64] (expected BF16 [384, 192])")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"sparsity_config": {"format": "marlin-24"}}, 'sparsity_config.format is "marlin-24"'),
        ({"quant_method": "gptq"}, "quantization_config is not one that sparsepack reads"),
        ({"config_groups": {"group_0": {}}}, "quantization_status is None (expected 'compressed')"),
    ],
)
def test_legacy_configuration(copy: Make, edit: dict[str, Any], problem: str) -> None:
    directory = copy("sparse-24-bitmask")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(edit)
    (directory / "config.json").write_text(json.dumps(config))
    refuses(directory, None, problem)
