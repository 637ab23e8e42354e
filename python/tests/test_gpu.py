"""Semi-structured weights on a GPU.

Skipped without one. With SPARSEPACK_REQUIRE_GPU=1 a missing or unfit device is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file

import sparsepack
from sparsepack import semi_structured
from sparsepack.semi_structured import Hardware

Make = Callable[[str], Path]
CUDA = torch.device("cuda", 0)
HARDWARE = Hardware.of(CUDA)
IDS = torch.arange(3, 51).view(2, 24)
REASON = HARDWARE.problem()


@pytest.fixture(autouse=True)
def device() -> None:
    if REASON is not None:
        if os.environ.get("SPARSEPACK_REQUIRE_GPU") == "1":
            pytest.fail(f"SPARSEPACK_REQUIRE_GPU=1, but {REASON}")
        pytest.skip(REASON)


def backends() -> list[str]:
    capable = HARDWARE.capability is None or HARDWARE.capability[0] == 8
    return [semi_structured.CUSPARSELT, *([semi_structured.CUTLASS] if capable else [])]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", ["sparse24", "sparse24-f16", "torch-cutlass"])
def test_logits_are_close_to_the_dense_models(name: str, backend: str, packed: Make) -> None:
    model = sparsepack.load(packed(name), device=CUDA, sparse=True, backend=backend)
    assert set(model.sparsepack_report.sparse.values()) == {backend}
    assert len(model.sparsepack_report.sparse) == 28
    assert {parameter.device for parameter in model.parameters()} == {CUDA}
    plain = sparsepack.load(packed(name), device=CUDA, sparse=False)
    assert not plain.sparsepack_report.sparse
    with torch.no_grad():
        ours, theirs = model(IDS.to(CUDA)).logits, plain(IDS.to(CUDA)).logits
    # The same products, summed in another order and rounded to 16 bits after each layer.
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", ["sparse24", "torch-cutlass"])
def test_a_weight_multiplies_as_its_dense_twin(name: str, backend: str, packed: Make, dense: Make) -> None:
    key = "model.layers.1.mlp.down_proj.weight"
    weight = sparsepack.load(packed(name), device=CUDA, backend=backend).get_parameter(key)
    matrix = load_file(dense(name) / "model.safetensors")[key].to(CUDA)
    # The identity gives back the weight itself, bit for bit: every sum has one term.
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=CUDA)
    assert torch.equal(torch.nn.functional.linear(eye, weight).t(), matrix)


def test_generation(packed: Make) -> None:
    model = sparsepack.load(packed("sparse24"), device=CUDA, sparse=True)
    out = model.generate(IDS[:1].to(CUDA), max_new_tokens=8, do_sample=False)
    assert out.shape[1] > IDS.shape[1]


def test_sparse_true_names_a_matrix_of_another_type(tmp_path: Path) -> None:
    run("convert", ROOT / "fixtures/model", "-o", tmp_path / "f32", "--format", "packed", "--dtype", "f32",
        "--prune", "magnitude", "--sparsity", "2:4")  # fmt: skip
    with pytest.raises(sparsepack.SparseUnavailableError, match="no 2:4 kernel multiplies F32"):
        sparsepack.load(tmp_path / "f32", device=CUDA, sparse=True)
