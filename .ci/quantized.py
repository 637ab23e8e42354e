"""Opens quantized directories with stock transformers and compressed-tensors.

quantized.py QUANTIZED DENSE: loads a directory in a format of compressed-tensors and the directory of the values that its codes
stand for. Every weight must be the same bit for bit, and so must logits and generated tokens be.
quantized.py --example EXECUTABLE: quantizes the fixture model with the example `quantize` of sparsepack-formats in every way first.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
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


def main():
    if sys.argv[1] != "--example":
        return compare(Path(sys.argv[1]), Path(sys.argv[2]))
    for grids in GRIDS:
        with tempfile.TemporaryDirectory() as work:
            subprocess.run([sys.argv[2], FIXTURES / "model", work, *grids], check=True)
            compare(Path(work) / "quantized", Path(work) / "dense")


if __name__ == "__main__":
    main()
