"""Directories that the sparsepack binary wrote from the fixture model, one a format, made once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Tensors here are tiny: threads that wait for each other would take most of the time.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "fixtures/model"

MAGNITUDE = ["--prune", "magnitude", "--sparsity"]
CALIBRATION = ["--samples", "8", "--seq-len", "64", "--calibration", str(ROOT / "fixtures/text/calibration.txt")]
GROUPS = ["--quantizer", "rtn", "--group-size", "32", "--quantize"]
# Quantized outputs, which only say by their codes what the dense values are.
QUANTIZED: dict[str, list[str]] = {
    "int4": ["--format", "packed", *GROUPS, "int4"],
    "int4-24": ["--format", "packed", *GROUPS, "int4", *MAGNITUDE, "2:4"],
    "int4-nm": ["--format", "packed", *GROUPS, "int4", *MAGNITUDE, "4:8"],
    "int4-bitmask": ["--format", "packed", *GROUPS, "int4", *MAGNITUDE, "50%"],
    "int3-asymmetric": ["--format", "packed", *GROUPS, "int3", "--asymmetric"],
    "int8": ["--format", "packed", "--quantize", "int8", "--quantizer", "rtn"],
    "int4-gptq": ["--format", "packed", "--quantize", "int4", "--group-size", "64", *CALIBRATION],
    "pack-quantized": ["--format", "compressed-tensors", *GROUPS, "int4"],
    "pack-quantized-24": ["--format", "compressed-tensors", *GROUPS, "int4", "--asymmetric", *MAGNITUDE, "2:4"],
    "int-quantized": ["--format", "compressed-tensors", "--quantize", "int8", "--quantizer", "rtn"],
    "float-quantized": ["--format", "compressed-tensors", "--quantize", "f8_e4m3", "--quantizer", "rtn"],
}
# What each format is made of: arguments of `convert`. The dense twin has the same but for --format, or is what
# `unpack` makes of codes.
OUTPUTS: dict[str, list[str]] = {
    "plain": ["--format", "safetensors", *MAGNITUDE, "2:4"],
    "sparse24": ["--format", "packed", *MAGNITUDE, "2:4"],
    "sparse24-f16": ["--format", "packed", "--dtype", "f16", *MAGNITUDE, "2:4"],
    "sparse24-f8": ["--format", "packed", "--dtype", "f8_e4m3", *MAGNITUDE, "2:4"],
    "nm-4-8": ["--format", "packed", *MAGNITUDE, "4:8"],
    "nm-2-16-f32": ["--format", "packed", "--dtype", "f32", *MAGNITUDE, "2:16"],
    "bitmask": ["--format", "packed", *MAGNITUDE, "60%"],
    "torch-cutlass": ["--format", "torch-cutlass", *MAGNITUDE, "2:4"],
    "sparse-24-bitmask": ["--format", "compressed-tensors", *MAGNITUDE, "2:4"],
    "sparse-bitmask": ["--format", "compressed-tensors", *MAGNITUDE, "60%"],
    "zst": ["--format", "zst", *MAGNITUDE, "2:4"],
    "zst-dense": ["--format", "zst"],
    "f8": ["--format", "safetensors", "--dtype", "f8_e4m3"],
    **QUANTIZED,
}


def binary() -> Path:
    """The program under test: SPARSEPACK_BIN, or what cargo built last in this checkout."""
    if named := os.environ.get("SPARSEPACK_BIN"):
        return Path(named).resolve()
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    built = [path for kind in ("release", "debug") if (path := target / kind / "sparsepack").is_file()]
    if not built:
        pytest.exit("no sparsepack binary: run `cargo build --release`, or set SPARSEPACK_BIN", returncode=2)
    return max(built, key=lambda path: path.stat().st_mtime)


def run(*args: object) -> None:
    done = subprocess.run([binary(), "--quiet", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, f"sparsepack {' '.join(map(str, args))}\n{done.stderr}"


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of an entry of OUTPUTS."""
    base = tmp_path_factory.mktemp("outputs")

    def make(name: str) -> Path:
        if not (base / name).is_dir():
            run("convert", MODEL, "-o", base / name, *OUTPUTS[name])
        return base / name

    return make


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, packed: Callable[[str], Path]) -> Callable[[str], Path]:
    """The same conversion, written as `--format safetensors`; of codes, what the binary decodes."""
    base = tmp_path_factory.mktemp("dense")
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str) -> Path:
        args = tuple(QUANTIZED.get(name, OUTPUTS[name][2:]))
        if args not in made and name in QUANTIZED:
            run("unpack", packed(name), "-o", base / name)
            made[args] = base / name
        elif args not in made:
            run("convert", MODEL, "-o", base / name, "--format", "safetensors", *args)
            made[args] = base / name
        return made[args]

    return make


@pytest.fixture
def copy(tmp_path: Path, packed: Callable[[str], Path]) -> Callable[[str], Path]:
    """A copy of a directory, to be damaged."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(packed(name), tmp_path / name))

    return make


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal type, shape and bytes: NaN equals itself, -0.0 is not +0.0."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
