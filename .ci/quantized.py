"""Opens quantized directories with stock transformers and compressed-tensors.

quantized.py QUANTIZED DENSE: loads a directory in a format of compressed-tensors and the directory of the values that its codes
stand for. Every weight must be the same bit for bit, and so must logits and generated tokens be.
quantized.py --example EXECUTABLE: quantizes the fixture model with the example `quantize` of sparsepack-formats in every way first.
quantized.py --program SPARSEPACK: with `sparsepack convert` first, solved on calibration text; the values are what the program
itself decodes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
GRIDS = [
    ["pack-quantized,4,32"],
    ["pack-quantized,4,32,asymmetric"],
    ["pack-quantized,4,0"],
    ["pack-quantized,8,0,asymmetric"],
    ["pack-quantized,3,64,asymmetric"],
    ["pack-quantized,2,32"],
    ["pack-quantized,5,32"],
    ["pack-quantized,6,128,asymmetric"],
    ["pack-quantized,7,32,asymmetric"],
    ["int-quantized,8,0"],
    ["int-quantized,8,64,asymmetric"],
    ["float-quantized,8,0"],
    ["pack-quantized,4,32", "down_proj=pack-quantized,8,0", "layers.0.=int-quantized,8,0"],
    ["pack-quantized,3,32,asymmetric", "self_attn=float-quantized,8,0"],
]

# Layers that stay dense, or have another grid or pattern.
RULES = """
[prune]
method = "sparsegpt"
sparsity = "2:4"
[quantize]
scheme = "int4"
group_size = 64
[[rule]]
targets = ["blocks:0..1"]
dense = true
[[rule]]
targets = ["down_proj"]
sparsity = "none"
quantize = "int8"
[[rule]]
targets = ["o_proj"]
quantize = "none"
[[rule]]
targets = ["k_proj"]
sparsity = "50%"
group_size = 32
"""
# Arguments of `convert`, the formats that come out, and the linears of the fixture's 28 that are quantized.
CONVERSIONS = [
    (["--quantize", "int4", "--group-size", "32"], {"pack-quantized"}, 28),
    (["--quantize", "int4", "--group-size", "32", "--asymmetric", "--act-order"], {"pack-quantized"}, 28),
    (["--quantize", "int8"], {"int-quantized"}, 28),
    (["--quantize", "int3", "--group-size", "64", "--asymmetric"], {"pack-quantized"}, 28),
    (["--quantize", "f8_e4m3"], {"float-quantized"}, 28),
    (["--recipe", "RULES"], {"pack-quantized", "int-quantized"}, 18),
    (["--quantize", "int4", "--group-size", "32", "--prune", "sparsegpt", "--sparsity", "2:4"], {"pack-quantized"}, 28),
]


def check(condition, what):
    print(("ok    " if condition else "WRONG ") + what)
    if not condition:
        sys.exit(1)


def loaded(directory):
    """A model in its own type, decompressed."""
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    wrong = {kind: names for kind, names in report.items() if names}
    check(not wrong, f"{directory.name}: every stored tensor has its place {wrong or ''}")
    return model.eval()


def compare(quantized, dense):
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    theirs, ours = loaded(quantized), loaded(dense)
    ids = AutoTokenizer.from_pretrained(dense)("The history of the city", return_tensors="pt").input_ids
    with torch.no_grad():
        logits, expected = theirs(ids).logits, ours(ids).logits
    weights, values = dict(theirs.named_parameters()), dict(ours.named_parameters())
    differ = [name for name, value in values.items()
              if weights[name].dtype != value.dtype or not torch.equal(weights[name].view(torch.int16), value.view(torch.int16))]
    groups = ", ".join(f"{group['weights']['num_bits']} bits {group['format']}" for group in config["config_groups"].values())
    check(not differ, f"{groups}: {len(values)} parameters equal bit for bit {differ[:3]}")
    check(torch.equal(logits, expected), f"{groups}: equal logits")
    tokens = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (theirs, ours)]
    check(torch.equal(*tokens) and tokens[0].shape[1] > ids.shape[1], f"{groups}: generates the same tokens")


def stored_formats(directory):
    """How many linears each format of the configuration stores; each has codes in the file and nothing else has."""
    groups = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"].values()
    with safe_open(directory / "model.safetensors", "pt") as file:
        coded = sorted(name.removesuffix("_scale") for name in file.keys() if name.endswith(".weight_scale"))
    modules = [name.removesuffix(".weight") for name in coded]
    named = [target for group in groups for target in group["targets"]]
    if named != ["Linear"]:
        check(sorted(named) == modules, f"config_groups name the {len(modules)} quantized linears one by one")
    return {group["format"] for group in groups}, coded


def converted(program):
    """Outputs of `sparsepack convert --format compressed-tensors`."""

    def sparsepack(*args):
        subprocess.run([program, "--quiet", *args], check=True, stdout=subprocess.DEVNULL)

    calibration = ["--samples", "8", "--seq-len", "64", "--calibration", FIXTURES / "text/calibration.txt"]
    for args, formats, count in CONVERSIONS:
        with tempfile.TemporaryDirectory() as work:
            quantized, dense, recipe = (Path(work) / name for name in ("quantized", "dense", "rules.toml"))
            recipe.write_text(RULES)
            args = [recipe if arg == "RULES" else arg for arg in args]
            sparsepack("convert", FIXTURES / "model", "-o", quantized, "--format", "compressed-tensors", *args, *calibration)
            sparsepack("convert", quantized, "-o", dense, "--format", "safetensors")
            found, coded = stored_formats(quantized)
            check((found, len(coded)) == (formats, count), f"{len(coded)} linears stored as {sorted(found)}")
            if "--prune" in args:
                values = load_file(dense / "model.safetensors")
                kept = max((values[name].view(-1, 4) != 0).sum(-1).max().item() for name in coded)
                check(kept == 2, "two of four codes stand for zero in every group")
            compare(quantized, dense)


def main():
    if sys.argv[1] == "--program":
        return converted(sys.argv[2])
    if sys.argv[1] != "--example":
        return compare(Path(sys.argv[1]), Path(sys.argv[2]))
    for grids in GRIDS:
        with tempfile.TemporaryDirectory() as work:
            subprocess.run([sys.argv[2], FIXTURES / "model", work, *grids], check=True)
            compare(Path(work) / "quantized", Path(work) / "dense")


if __name__ == "__main__":
    main()
