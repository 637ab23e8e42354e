"""Opens sparsepack's outputs with the readers they are for: safetensors, transformers, zstandard.

interop.py BINARY: converts the fixture model and tiny models, loads the results in stock
transformers and compares values, logits, token ids and perplexity with what sparsepack says. Packed
outputs are also decoded here, from docs/FORMATS.md alone.
"""

import hashlib
import json
import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
import zstandard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
BINARY = sys.argv[1]
WINDOW, WINDOWS = 256, 8


def sparsepack(*args):
    run = subprocess.run([BINARY, "--quiet", *map(str, args)], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"sparsepack {' '.join(map(str, args))}\n{run.stderr}")
    return run.stdout


def tensors(directory):
    merged = {}
    for shard in sorted(Path(directory).glob("*.safetensors")):
        merged.update(load_file(shard))
    return merged


def perplexity(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    total = 0.0
    with torch.no_grad():
        for window in range(WINDOWS):
            x = ids[:, window * WINDOW : (window + 1) * WINDOW]
            logits = model(x).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").item()
    return math.exp(total / (WINDOWS * (WINDOW - 1)))


def check(condition, what):
    print(("ok    " if condition else "WRONG ") + what)
    if not condition:
        sys.exit(1)


def fixture_model(work):
    """2:4, packed and plain: the same values, and the perplexity that sparsepack eval prints."""
    text = FIXTURES / "text/heldout.txt"
    common = ["--prune", "sparsegpt", "--sparsity", "2:4", "--samples", 16, "--seq-len", 256]
    common += ["--calibration", FIXTURES / "text/calibration.txt"]
    for name in ("packed", "safetensors"):
        sparsepack("convert", FIXTURES / "model", "-o", work / name, "--format", name, *common)
    sparsepack("unpack", work / "packed", "-o", work / "unpacked")
    plain, unpacked = tensors(work / "safetensors"), tensors(work / "unpacked")
    same = plain.keys() == unpacked.keys() and all(
        torch.equal(plain[k].view(torch.int16), unpacked[k].view(torch.int16)) for k in plain
    )
    check(same, f"unpacked equals the plain directory bit for bit ({len(plain)} tensors)")

    pruned = [v for k, v in plain.items() if k.endswith("_proj.weight")]
    zeros = [(v.view(v.shape[0], -1, 4) == 0).sum(-1).min().item() for v in pruned]
    check(min(zeros) >= 2, f"every group of 4 in {len(pruned)} linears has two zeros")

    model = AutoModelForCausalLM.from_pretrained(work / "safetensors", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work / "safetensors")
    theirs = perplexity(model, tokenizer, text.read_text())
    ours = json.loads(
        sparsepack("eval", work / "packed", "--text", text, "--window", WINDOW,
                   "--max-windows", WINDOWS, "--compute", "f32", "--json")
    )["perplexity"]
    check(abs(ours / theirs - 1) < 1e-4, f"perplexity {ours:.4f} (transformers {theirs:.4f})")
    check(
        model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "the tied head is still tied",
    )
    generated = model.generate(tokenizer("The", return_tensors="pt").input_ids, max_new_tokens=8,
                               do_sample=False)
    check(generated.shape[1] > 1, f"generates: {tokenizer.decode(generated[0])!r}")


def columns(mask, cols):
    """The columns that each row of a mask marks, as a matrix of booleans."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(mask.shape[0], -1)[:, :cols].bool()


def decoded(stored, name, how):
    """A packed tensor by the layouts of docs/FORMATS.md."""
    values = stored[name + ".values"]
    dense = torch.zeros(how["shape"], dtype=values.dtype)
    rows, cols = how["shape"]
    if how["encoding"] == "sparse24":
        metadata = stored[name + ".metadata"]
        nibbles = torch.stack([metadata & 15, metadata >> 4], -1).reshape(rows, -1)[:, : cols // 4]
        at = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
        at += 4 * torch.arange(cols // 4).unsqueeze(-1)
        return dense.scatter_(1, at.reshape(rows, -1), values)
    marked = columns(stored[name + ".mask"], cols)
    if how["encoding"] == "nm":
        groups = marked.reshape(rows, -1, how["m"])
        check_quietly((groups.sum(-1) == how["n"]).all(), f"{name} keeps n of m")
        dense[marked] = values.flatten()
        return dense
    offsets = stored[name + ".offsets"].view(torch.int64).tolist()
    counts = [int(marked[:row].sum()) for row in range(0, rows, 64)] + [int(marked.sum())]
    check_quietly(offsets == counts, f"{name} has the offsets of its mask")
    check_quietly(len(values) == how["kept"] and not values[counts[-1] :].any(), f"{name} is padded")
    dense[marked] = values[: counts[-1]]
    return dense


def check_quietly(condition, what):
    if not condition:
        check(False, what)


def packed_models(work):
    """Every packed encoding, decoded here, gives the plain output."""
    for sparsity in ("2:4", "4:8", "3:16", "50%", "70%"):
        common = ["--prune", "magnitude", "--sparsity", sparsity]
        name = sparsity.replace(":", "of").replace("%", "percent")
        plain, packed = work / f"plain-{name}", work / f"packed-{name}"
        sparsepack("convert", FIXTURES / "model", "-o", plain, *common)
        sparsepack("convert", FIXTURES / "model", "-o", packed, "--format", "packed", *common)
        with safe_open(packed / "model.safetensors", "pt") as file:
            encodings = json.loads(file.metadata()["sparsepack.encodings"])
        stored = load_file(packed / "model.safetensors")
        expected = load_file(plain / "model.safetensors")
        same = all(
            torch.equal(decoded(stored, tensor, how).view(torch.int16), expected[tensor].view(torch.int16))
            for tensor, how in encodings.items()
        )
        kinds = {how["encoding"] for how in encodings.values()}
        check(same and len(encodings) == 28, f"{sparsity} as {kinds} decodes to the plain output")


def gguf_models(work):
    """GGUF to a Hugging Face directory: transformers computes the recorded logits."""
    for name in ("llama-gqa", "qwen2"):
        out = work / name
        sparsepack("convert", FIXTURES / f"tiny/{name}.gguf", "-o", out, "--dtype", "f32")
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        golden = load_file(FIXTURES / f"tiny/{name}/golden.safetensors")
        with torch.no_grad():
            logits = model(golden["input_ids"].reshape(1, -1)).logits[0]
        error = ((logits - golden["logits"]).abs().max() / golden["logits"].abs().max()).item()
        check(error < 1e-5, f"{name}.gguf: logits within {error:.1e} in transformers")


def sliced_models(work):
    """A slice in one basis is a stock model: its class without code of its own, and the perplexity that
    sparsepack eval prints."""
    text = FIXTURES / "text/heldout.txt"
    common = ["--samples", 16, "--seq-len", 256, "--calibration", FIXTURES / "text/calibration.txt"]
    for width, expected in ((96, "LlamaForCausalLM"), (98, "MistralForCausalLM")):
        out = work / f"sliced-{width}"
        sparsepack("convert", FIXTURES / "model", "-o", out, "--slice-width", width, *common)
        model, loading = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
        name = type(model).__name__
        strays = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[key]]
        check(name == expected and not strays, f"{width} columns: {name}, every tensor in its place")
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        check(table is not head and table.shape == head.shape == (1024, width),
              f"{width} columns: the output matrix is its own")
        tokenizer = AutoTokenizer.from_pretrained(out)
        theirs = perplexity(model, tokenizer, text.read_text())
        ours = json.loads(
            sparsepack("eval", out, "--text", text, "--window", WINDOW,
                       "--max-windows", WINDOWS, "--compute", "f32", "--json")
        )["perplexity"]
        check(abs(ours / theirs - 1) < 1e-4,
              f"{width} columns: perplexity {ours:.4f} (transformers {theirs:.4f})")
        generated = model.generate(tokenizer("The", return_tensors="pt").input_ids,
                                   max_new_tokens=8, do_sample=False)
        check(generated.shape[1] > 1, f"generates: {tokenizer.decode(generated[0])!r}")


def container_tensors(path):
    """Reads model.spz by docs/FORMATS.md: name and bytes of each component."""
    data = path.read_bytes()
    assert data[:8] == b"\x5a\x2a\x4d\x18\x10\0\0\0" and data[8:24] == b"SPARSEPK\x01" + bytes(7)
    length, magic = struct.unpack("<Q8s", data[-16:])
    index, digest = data[-48 - length : -48], data[-48:-16]
    assert magic == b"SPARSEPK" and hashlib.sha256(index).digest() == digest
    index = json.loads(index)
    for tensor in index["tensors"]:
        width = {"BF16": 2, "F16": 2, "F32": 4}[tensor["dtype"]]
        left = width * math.prod(tensor["shape"])
        raw = []
        for chunk in tensor["components"][0]["chunks"]:
            count = min(left, index["chunk_bytes"]) // width
            left -= count * width
            position, planes = chunk["offset"], []
            for frame in chunk["frames"]:
                plane = zstandard.ZstdDecompressor().decompress(data[position : position + frame])
                planes.append(numpy.frombuffer(plane, numpy.uint8))
                position += frame
            kept = numpy.ones(count, bool)
            if chunk["mask"]:
                kept = numpy.unpackbits(planes.pop(0), count=count, bitorder="little").astype(bool)
            rotated = sum(p.astype(numpy.uint64) << (8 * (width - 1 - i)) for i, p in enumerate(planes))
            values = numpy.zeros(count, numpy.uint64)
            values[kept] = (rotated >> 1) | ((rotated & 1) << (8 * width - 1))
            raw.append(values.astype(f"<u{width}").tobytes())
        raw = b"".join(raw)
        assert hashlib.sha256(raw).hexdigest() == tensor["components"][0]["sha256"]
        yield tensor["name"], raw


def compressed(work):
    """model.spz read with zstandard and numpy alone: the bytes of the plain directory."""
    for args in (["--prune", "magnitude", "--sparsity", "50%"], ["--dtype", "f32"]):
        plain, zst = work / f"plain{len(args)}", work / f"zst{len(args)}"
        sparsepack("convert", FIXTURES / "model", "-o", plain, *args)
        sparsepack("convert", FIXTURES / "model", "-o", zst, "--format", "zst", *args)
        expected = {k: v.view(torch.uint8).numpy().tobytes() for k, v in tensors(plain).items()}
        check(dict(container_tensors(zst / "model.spz")) == expected,
              f"zst {' '.join(args)}: {len(expected)} tensors equal byte for byte")
        stream = zstandard.ZstdDecompressor().stream_reader(
            (zst / "model.spz").read_bytes(), read_across_frames=True)
        check(sum(len(piece) for piece in iter(lambda: stream.read(1 << 20), b"")) > 0,
              "the whole file is a zstd stream")


def real_model(work):
    """SmolLM2 from its GGUF: the tokenizer that is written gives llama.cpp's token ids."""
    source = FIXTURES.parent / "target/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    sparsepack("convert", source, "-o", work / "smollm2", "--prune", "magnitude",
               "--sparsity", "2:4")
    tokenizer = AutoTokenizer.from_pretrained(work / "smollm2")
    golden = json.loads((FIXTURES / "golden/tokens/tricky.json").read_text())
    lines = (FIXTURES / "golden/tokens/tricky.txt").read_bytes().decode().split("\n")
    pairs = list(zip(lines, golden["lines"]))
    wrong = [line for line, ids in pairs
             if tokenizer(line, add_special_tokens=False, split_special_tokens=True).input_ids != ids]
    check(not wrong, f"{len(pairs)} tricky lines have llama.cpp's token ids {wrong[:3]}")
    model = AutoModelForCausalLM.from_pretrained(work / "smollm2")
    check(model.dtype == torch.bfloat16, "SmolLM2 loads as bf16 in transformers")


def main():
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        fixture_model(work)
        packed_models(work)
        gguf_models(work)
        sliced_models(work)
        compressed(work)
        real_model(work)
    print("all outputs load in their readers")


if __name__ == "__main__":
    main()
