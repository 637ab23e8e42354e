"""Reads outputs of --format compressed-tensors with the last releases that could, and compares every weight bit by bit.

    python3 -m venv .ci/venv-legacy && .ci/venv-legacy/bin/pip install -r .ci/requirements-legacy.txt
    .ci/venv-legacy/bin/python .ci/legacy_ct.py target/release/sparsepack

sparse-24-bitmask goes through transformers' from_pretrained; sparse-bitmask, which transformers never loaded, through the library's
own generator of decompressed weights.
"""
import json, subprocess, sys, tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import BitmaskConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
BITS = {2: torch.int16, 4: torch.int32}


def sparsepack(*args):
    subprocess.run([sys.argv[1], *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize]))


def convert(out, *options):
    """An output, its plain form, and the format that its configuration names."""
    model = ROOT / options[0]
    sparsepack("convert", model, "-o", out, "--format", "compressed-tensors", *options[1:], "-q")
    plain = out.with_name(out.name + "-plain")
    sparsepack("unpack", out, "-o", plain, "-q")
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    return load_file(plain / "model.safetensors"), quantization["sparsity_config"]["format"], plain


def check_transformers(out, *options):
    dense, format, plain = convert(out, *options)
    assert format == "sparse-24-bitmask", format
    stored = load_file(out / "model.safetensors")
    packed = [name for name in stored if name.endswith(".bitmask")]
    assert packed
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    # Weights are unpacked when a module first runs.
    ids = torch.arange(24).reshape(2, 12)
    logits = loaded(ids).logits
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype="auto")(ids).logits
    assert torch.equal(logits, expected), (logits - expected).abs().max()
    state = loaded.state_dict()
    wrong = [name for name, value in dense.items() if name not in state or not same(state[name], value)]
    assert not wrong, wrong
    print(f"{out.name}: transformers: {len(dense)} tensors, {len(packed)} packed, equal; logits equal")


def check_library(out, *options):
    dense, format, _ = convert(out, *options)
    assert format == "sparse-bitmask", format
    compressor = BaseCompressor.load_from_registry("sparse-bitmask", config=BitmaskConfig())
    found = dict(compressor.decompress(str(out)))
    assert found.keys() == dense.keys(), found.keys() ^ dense.keys()
    wrong = [name for name, value in dense.items() if not same(found[name], value)]
    assert not wrong, wrong
    print(f"{out.name}: compressed-tensors: {len(dense)} tensors equal")


def main():
    magnitude = ("--prune", "magnitude")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        check_transformers(work / "llama", "fixtures/model", *magnitude, "--sparsity", "2:4")
        check_transformers(
            work / "some-layers", "fixtures/model", *magnitude, "--sparsity", "2:4", "--ignore", "o_proj", "--dtype", "f16"
        )
        check_transformers(work / "qwen2", "fixtures/tiny/qwen2", *magnitude, "--sparsity", "2:4")
        check_transformers(work / "opt", "fixtures/tiny/opt", *magnitude, "--sparsity", "1:4")
        check_library(work / "llama-50", "fixtures/model", *magnitude, "--sparsity", "50%")
        check_library(work / "llama-6of8", "fixtures/model", *magnitude, "--sparsity", "6:8", "--dtype", "f32")


if __name__ == "__main__":
    main()
