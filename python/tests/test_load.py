"""Models from packed directories, against transformers' from dense ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OUTPUTS, ROOT
from safetensors.torch import load_file, save_file
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass
from transformers import AutoModelForCausalLM

import sparsepack
from sparsepack import FormatError, SparseUnavailableError, semi_structured
from sparsepack.encodings import Dense, Sparse24, TorchCutlass
from sparsepack.semi_structured import Hardware

Make = Callable[[str], Path]
IDS = torch.arange(3, 51).view(2, 24)
CPU = torch.device("cpu")


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids.to(model.device)).logits
    return out


@pytest.mark.parametrize("name", OUTPUTS)
def test_logits_are_those_of_the_dense_directory(name: str, packed: Make, dense: Make) -> None:
    model = sparsepack.load(packed(name), dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(dense(name), dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(theirs))
    assert not model.training


@pytest.mark.parametrize("name", ["sparse24", "zst", "sparse-bitmask", "int4-24", "pack-quantized"])
def test_generates_what_the_dense_directory_does(name: str, packed: Make, dense: Make) -> None:
    model = sparsepack.load(packed(name))
    theirs = AutoModelForCausalLM.from_pretrained(dense(name))
    assert model.dtype == theirs.dtype == torch.bfloat16
    ours = model.generate(IDS[:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, theirs.generate(IDS[:1], max_new_tokens=12, do_sample=False))
    assert ours.shape[1] > IDS.shape[1]
    assert model.generation_config.eos_token_id == theirs.generation_config.eos_token_id


@pytest.mark.parametrize(
    "family", ["llama-gqa", "llama-mha-tied", "llama-sharded", "llama3-rope", "mistral", "opt", "qwen2"]
)
def test_families(family: str) -> None:
    directory = ROOT / "fixtures/tiny" / family
    model, theirs = sparsepack.load(directory), AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(model), logits(theirs))
    ours = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert ours == {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}


def test_a_tied_head_stays_tied(packed: Make) -> None:
    model = sparsepack.load(packed("sparse24"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_dtype(packed: Make) -> None:
    model = sparsepack.load(packed("sparse24"), dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32


def test_weights_are_decoded_one_at_a_time(packed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is in its parameter before the next is decoded, and nothing but parameters holds it."""
    pending: list[Callable[[], bool]] = []
    real = sparsepack.Checkpoint.dense
    model_of: list[Any] = []
    empty = sparsepack.loading.empty_model

    def remembered(*args: Any) -> Any:
        model_of.append(empty(*args))
        assert all(parameter.is_meta for parameter in model_of[0].parameters())
        return model_of[0]

    def watched(self: sparsepack.Checkpoint, name: str) -> torch.Tensor:
        assert all(done() for done in pending)
        pending.append(lambda: not model_of[0].get_parameter(name).is_meta)
        return real(self, name)

    monkeypatch.setattr("sparsepack.loading.empty_model", remembered)
    monkeypatch.setattr(sparsepack.Checkpoint, "dense", watched)
    sparsepack.load(packed("sparse24"))
    assert len(pending) > 30


def test_the_report_on_a_cpu(packed: Make) -> None:
    report = sparsepack.load(packed("sparse24")).sparsepack_report
    assert report.sparse == {}
    assert set(report.dense.values()) == {"on cpu"}
    assert len(report.dense) == 28
    assert report.encodings["model.norm.weight"] == "dense"
    assert "28 2:4 weights decoded" in str(report)


def test_sparse_false(packed: Make) -> None:
    report = sparsepack.load(packed("sparse24"), sparse=False).sparsepack_report
    assert set(report.dense.values()) == {"sparse=False"}


def test_sparse_true_without_a_gpu(packed: Make) -> None:
    with pytest.raises(SparseUnavailableError, match=r"_proj\.weight: on cpu \(and 27 more\)$"):
        sparsepack.load(packed("sparse24"), device="cpu", sparse=True)


def test_sparse_true_without_a_24_weight(packed: Make) -> None:
    with pytest.raises(SparseUnavailableError, match=r"no linear is stored as sparse24 or torch-cutlass$"):
        sparsepack.load(packed("nm-4-8"), sparse=True)


@pytest.mark.parametrize("arguments", [{"sparse": "always"}, {"backend": "triton"}])
def test_arguments(packed: Make, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        sparsepack.load(packed("sparse24"), **arguments)


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_missing_tensor(copy: Make) -> None:
    directory = rewrite(copy("plain"), lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(FormatError, match=r"model\.norm\.weight: the model has this parameter, the directory does not"):
        sparsepack.load(directory)


def test_an_unknown_tensor(copy: Make) -> None:
    directory = rewrite(copy("plain"), lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(FormatError, match="extra: the model has no such parameter"):
        sparsepack.load(directory)


def test_a_tensor_of_another_shape(copy: Make) -> None:
    directory = rewrite(copy("plain"), lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    with pytest.raises(FormatError, match=r"model\.norm\.weight: shape is \[7\] \(expected \[128\]\)"):
        sparsepack.load(directory)


def test_rotary_frequencies_are_ignored(copy: Make) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    directory = rewrite(copy("plain"), lambda tensors: tensors.update({name: torch.zeros(16)}))
    assert sparsepack.load(directory).sparsepack_report.ignored == [name]


def test_names_without_the_prefix_of_the_base_model(copy: Make, packed: Make) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    directory = rewrite(copy("plain"), strip)
    assert torch.equal(logits(sparsepack.load(directory)), logits(sparsepack.load(packed("plain"))))


def test_no_type_to_compute_in(copy: Make) -> None:
    directory = copy("plain")
    config = json.loads((directory / "config.json").read_text())
    config["dtype"] = "float8_e4m3fn"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"dtype is torch\.float8_e4m3fn; give load the dtype to compute in"):
        sparsepack.load(directory)


# Which weights are semi-structured. No device is needed to decide.

AMPERE, HOPPER = (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "encoding", "dtype", "wanted", "backend", "why"),
    [
        (AMPERE, True, TorchCutlass, torch.bfloat16, None, "cutlass", ""),
        (AMPERE, True, Sparse24, torch.bfloat16, None, "cusparselt", ""),
        (AMPERE, False, Sparse24, torch.float16, None, "cutlass", ""),
        (AMPERE, True, Sparse24, torch.float16, "cutlass", "cutlass", ""),
        (HOPPER, True, TorchCutlass, torch.bfloat16, None, "cusparselt", ""),
        (HOPPER, True, Sparse24, torch.bfloat16, None, "cusparselt", ""),
        ((12, 0), True, Sparse24, torch.bfloat16, None, "cusparselt", ""),
        (HOPPER, True, Sparse24, torch.bfloat16, "cutlass", "",
         "cutlass: torch's kernels run on compute capability 8.x only"),
        (HOPPER, False, Sparse24, torch.bfloat16, None, "",
         "torch has no cuSPARSELt, and CUTLASS kernels do not run on compute capability 9.0"),
        ((7, 5), True, Sparse24, torch.bfloat16, None, "", "compute capability 7.5 of cpu is below 8.0"),
        (None, False, Sparse24, torch.bfloat16, None, "", "on cpu"),
        (HOPPER, True, Sparse24, torch.float32, None, "",
         "cusparselt: no 2:4 kernel multiplies F32 weights and activations; "
         "cutlass: no 2:4 kernel multiplies F32 weights and activations"),
        (AMPERE, True, Dense, torch.bfloat16, None, "", "stored as dense, not as 2:4"),
    ],
)  # fmt: skip
def test_choice_of_a_backend(
    capability: tuple[int, int] | None, cusparselt: bool, encoding: type, dtype: torch.dtype,
    wanted: str | None, backend: str, why: str,
) -> None:  # fmt: skip
    hardware = Hardware(CPU, capability, cusparselt)
    assert semi_structured.choose(hardware, encoding(dtype, (128, 256)), dtype, wanted) == (backend, why)


def test_shapes_that_no_backend_takes() -> None:
    hardware = Hardware(CPU, AMPERE, True)
    assert semi_structured.choose(hardware, Sparse24(torch.bfloat16, (24, 64)), torch.bfloat16, None) == (
        "",
        "cusparselt: shape [24, 64] is not in multiples of [16, 16]; "
        "cutlass: shape [24, 64] is not in multiples of [32, 64], which the CUTLASS layout needs",
    )


# Loading as on a GPU, with torch's two products emulated: what is tested is everything around them.


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, int]], None]]:
    def mm(packed: torch.Tensor, meta: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return sparse_semi_structured_to_dense_cutlass(packed, meta) @ right

    def addmm(bias: torch.Tensor, packed: torch.Tensor, meta: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return mm(packed, meta, right) + bias.unsqueeze(1)

    def cslt_mm(packed: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        return packed @ right + (0 if bias is None else bias.unsqueeze(1))

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", addmm)
    monkeypatch.setattr(torch, "_cslt_compress", lambda matrix: matrix)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cslt_mm)
    monkeypatch.setattr(
        SparseSemiStructuredTensorCUSPARSELT, "_validate_device_dim_dtype_shape", classmethod(lambda *_: None)
    )

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(Hardware, "of", classmethod(lambda cls, device: cls(device, capability, True)))

    yield pretend


@pytest.mark.parametrize(
    ("name", "capability", "backend", "chosen"),
    [
        ("torch-cutlass", AMPERE, None, "cutlass"),
        ("torch-cutlass", HOPPER, None, "cusparselt"),
        ("sparse24", AMPERE, None, "cusparselt"),
        ("sparse24", AMPERE, "cutlass", "cutlass"),
        ("sparse24-f16", AMPERE, "cutlass", "cutlass"),
    ],
)
def test_semi_structured_models(
    name: str, capability: tuple[int, int], backend: Any, chosen: str, emulated: Any, packed: Make, dense: Make
) -> None:
    emulated(capability)
    model = sparsepack.load(packed(name), sparse=True, backend=backend)
    assert len(model.sparsepack_report.sparse) == 28
    assert set(model.sparsepack_report.sparse.values()) == {chosen}
    assert model.sparsepack_report.dense == {}
    weight = model.model.layers[0].mlp.up_proj.weight
    kinds = {"cutlass": SparseSemiStructuredTensorCUTLASS, "cusparselt": SparseSemiStructuredTensorCUSPARSELT}
    assert isinstance(weight, kinds[chosen])
    theirs = logits(AutoModelForCausalLM.from_pretrained(dense(name)))
    # Sums of bf16 products in another order.
    assert (logits(model) - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape == (1, 28)


def test_torch_cutlass_components_are_used_as_they_are(emulated: Any, packed: Make, dense: Make) -> None:
    emulated(AMPERE)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = sparsepack.load(packed("torch-cutlass")).get_parameter(name)
    stored = load_file(packed("torch-cutlass") / "model.safetensors")
    assert torch.equal(weight.packed, stored[name + ".packed"])
    assert torch.equal(weight.meta, stored[name + ".meta"])
    assert torch.equal(weight.to_dense(), load_file(dense("torch-cutlass") / "model.safetensors")[name])


def test_biases_of_semi_structured_linears(emulated: Any, tmp_path: Path) -> None:
    """OPT's linears have biases; its fixture's matrices are of 32 and 64 columns, so only some are CUTLASS's."""
    from conftest import run

    run("convert", ROOT / "fixtures/tiny/opt", "-o", tmp_path / "opt", "--format", "packed",
        "--dtype", "f16", "--prune", "magnitude", "--sparsity", "2:4")  # fmt: skip
    expected = logits(sparsepack.load(tmp_path / "opt"))
    emulated(AMPERE)
    model = sparsepack.load(tmp_path / "opt")
    assert model.sparsepack_report.sparse
    assert torch.allclose(logits(model), expected, atol=2e-2 * expected.abs().max())


def test_malformed_components_are_not_used(emulated: Any, copy: Make) -> None:
    emulated(AMPERE)
    directory = copy("torch-cutlass")
    name = "model.layers.1.mlp.down_proj.weight"
    content = (directory / "model.safetensors").read_bytes()
    stored = load_file(directory / "model.safetensors")[name + ".meta"].numpy().tobytes()
    (directory / "model.safetensors").write_bytes(content.replace(stored, b"\0" + stored[1:], 1))
    with pytest.raises(FormatError, match=rf"{name}: metadata has an illegal nibble"):
        sparsepack.load(directory)
