"""Loads sparsepack's GGUF outputs in llama.cpp, and reads rewritten files with the gguf package.

llama_cpp.py BINARY [MODEL ...]: converts the fixture model (and further Hugging Face models) to
several types and compares token ids and perplexity with what sparsepack says of the output; K types
on the fixture model widened to whole blocks of 256. Blocks solved on calibration text are also compared
with what the gguf package decodes. A SentencePiece vocabulary is written from each of
its files, and its ids are compared with tokenizers' and the recorded ones. The perplexity is taken from llama.cpp's next-token log-probabilities, one request a token, over
windows without overlap in which each token but the first is predicted.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import xllamacpp
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
BINARY = sys.argv[1]
TEXT = FIXTURES / "text/heldout.txt"
TYPES = ["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "mxfp4"]
K_TYPES = ["q6_k", "q5_k", "q4_k", "q3_k"]
WINDOW, WINDOWS = 48, 2
CALIBRATION = ["--samples", 8, "--seq-len", 64, "--calibration", FIXTURES / "text/calibration.txt"]

sys.path.insert(0, str(FIXTURES / "make"))
from widen import widen


def sparsepack(*args):
    run = subprocess.run([BINARY, "--quiet", *map(str, args)], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"sparsepack {' '.join(map(str, args))}\n{run.stderr}")
    return run.stdout


def check(condition, what):
    print(("ok    " if condition else "WRONG ") + what)
    if not condition:
        sys.exit(1)


class LlamaCpp:
    """A model in a server of llama.cpp."""

    def __init__(self, path):
        p = xllamacpp.CommonParams()
        p.model.path = str(path)
        p.n_ctx, p.warmup, p.n_parallel, p.verbosity, p.fit_params = 256, False, 1, 0, False
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # The kernels for matrices in another order of blocks crash on some processors with AMX.
        p.no_extra_bufts = True
        p.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(p)
        # A split has them in its first file.
        self.vocabulary = len(GGUFReader(path).fields["tokenizer.ggml.tokens"].data)

    def request(self, what, body):
        request = urllib.request.Request(f"{self.server.listening_address}/{what}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    def tokenize(self, text):
        return self.request("tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    def log_probability(self, prompt, token):
        """Of `token` after `prompt`; temperature -1 gives the plain softmax of all logits."""
        body = {"prompt": prompt, "n_predict": 1, "n_probs": self.vocabulary, "temperature": -1.0, "cache_prompt": True}
        top = self.request("completion", body)["completion_probabilities"][0]["top_logprobs"]
        return next(entry["logprob"] for entry in top if entry["id"] == token)

    def perplexity(self, ids):
        total = 0.0
        for start in range(0, WINDOW * WINDOWS, WINDOW):
            window = ids[start : start + WINDOW]
            total -= sum(self.log_probability(window[:n], window[n]) for n in range(1, WINDOW))
        return math.exp(total / (WINDOWS * (WINDOW - 1)))


def converted(work, model, types, tolerance=0.01):
    """Every type, rounded to nearest."""
    compare(work, model, {name: ["--dtype", name] for name in types}, tolerance)


def solved(work, model, outputs, tolerance):
    """Blocks solved with error feedback. llama.cpp rounds activations to 8 bits before it multiplies them with blocks, which sparsepack
    does not; with the same values in f32, as the gguf package decodes them too, perplexities are closer."""
    compare(work, model, {name: args + CALIBRATION for name, args in outputs.items()}, tolerance)
    for name, args in outputs.items():
        source, plain = work / f"{model.name}-{name}", work / f"{model.name}-{name}-f32"
        sparsepack("convert", source, "-o", plain, "--format", "gguf", "--dtype", "f32")
        blocks, floats = (GGUFReader(directory / "model.gguf").tensors for directory in (source, plain))
        linears = [t for t in blocks if t.name.startswith("blk.") and len(t.shape) == 2]
        kinds = {t.tensor_type.name for t in linears}
        check(len(linears) == 28 and kinds == {args[1].upper()}, f"{model.name} {name}: {len(linears)} linears are {sorted(kinds)}")
        decoded = {t.name: dequantize(t.data, t.tensor_type) for t in blocks}
        same = all(np.array_equal(decoded[t.name].view(np.uint32), t.data.reshape(decoded[t.name].shape).view(np.uint32)) for t in floats)
        check(same and len(floats) == len(blocks), f"{model.name} {name}: {len(floats)} tensors decode to the same bits in the gguf package")
        if "2:4" in args:
            kept = max((decoded[t.name].reshape(-1, 4) != 0).sum(-1).max() for t in linears)
            check(kept == 2, f"{model.name} {name}: two of four values in every group are zeros")
        evaluated(source, plain, f"{model.name} {name}", 1e-4)


def sliced(work, model, outputs, tolerance):
    """Slices in one basis, which stock programs run."""
    compare(work, model, {name: args + CALIBRATION for name, args in outputs.items()}, tolerance)


def compare(work, model, outputs, tolerance):
    """Every output: the ids of the tokenizer of the source, and the perplexity of sparsepack eval."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    expected = tokenizer.encode(TEXT.read_bytes().decode(), add_special_tokens=False).ids
    for name, args in outputs.items():
        out = work / f"{model.name}-{name}"
        sparsepack("convert", model, "-o", out, "--format", "gguf", *args)
        ids = evaluated(out, out, f"{model.name} {name}", tolerance)
        check(ids == expected, f"{model.name} {name}: {len(ids)} token ids in llama.cpp as in tokenizers")


def evaluated(ours, theirs, what, tolerance):
    """The perplexity of one output in sparsepack, and of it or another in llama.cpp, which also tokenizes."""
    llama = LlamaCpp(theirs / "model.gguf")
    ids = llama.tokenize(TEXT.read_bytes().decode())
    report = json.loads(sparsepack("eval", ours, "--text", TEXT, "--window", WINDOW,
                                   "--max-windows", WINDOWS, "--compute", "f32", "--json"))
    found, expected = report["perplexity"], llama.perplexity(ids)
    check(abs(found / expected - 1) < tolerance, f"{what}: perplexity {found:.4f}, {expected:.4f} in llama.cpp of {theirs.name}")
    return ids


def fields(reader):
    """Keys of the file with types and values, in order; not the reader's own counts."""
    return [(f.name, [t.name for t in f.types], f.contents()) for f in reader.fields.values() if not f.name.startswith("GGUF.")]


def rewritten(work, path):
    """GGUF to GGUF: every key, value, type and byte is kept."""
    out = work / f"again-{path.stem}"
    sparsepack("convert", path, "-o", out, "--format", "gguf")
    before, after = GGUFReader(path), GGUFReader(out / "model.gguf")
    check(fields(before) == fields(after), f"{path.name}: {len(before.fields)} keys are kept")
    same = all(
        (a.name, a.tensor_type, list(a.shape)) == (b.name, b.tensor_type, list(b.shape)) and a.data.tobytes() == b.data.tobytes()
        for a, b in zip(before.tensors, after.tensors, strict=True)
    )
    check(same, f"{path.name}: {len(before.tensors)} tensors are kept")


def sentencepiece(work):
    """A vocabulary from tokenizer.model, from tokenizer.json and from both, and back."""
    golden = json.loads((FIXTURES / "spm/ids.json").read_text())
    cases = [(case["text"], case["ids"]) for case in golden["cases"] if case["text"]]
    heldout = TEXT.read_bytes().decode().lstrip()
    for missing in [None, "tokenizer.json", "tokenizer.model"]:
        model, out, back = (work / f"spm-{missing}-{part}" for part in ("model", "gguf", "back"))
        shutil.copytree(FIXTURES / "spm", model)
        if missing:
            (model / missing).unlink()
        sparsepack("convert", model, "-o", out, "--format", "gguf")
        llama = LlamaCpp(out / "model.gguf")
        what = f"SentencePiece without {missing}" if missing else "SentencePiece"
        check(all(llama.tokenize(text) == ids for text, ids in cases), f"{what}: the recorded ids of {len(cases)} texts in llama.cpp")
        sparsepack("convert", out, "-o", back, "--dtype", "f16")
        for name, directory in (("source", model), ("way back", back)):
            if not (directory / "tokenizer.json").is_file():
                continue
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            tokenizer.encode_special_tokens = True
            ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
            check(ids(heldout) == llama.tokenize(heldout), f"{what}: ids of a long text as in tokenizers, {name}")
            # transformers 5 adds no space before a text that starts with one; SentencePiece does.
            same = [(text, want) for text, want in cases if directory == back or not text.startswith((" ", "\u2581"))]
            check(all(ids(text) == want for text, want in same), f"{what}: ids of {len(same)} texts as in tokenizers, {name}")
        parsed = llama.request("tokenize", {"content": "a", "add_special": True})["tokens"]
        check(parsed[0] == 1, f"{what}: prompts start with <s>")


def split(work):
    """llama.cpp opens a split by its first file."""
    sparsepack("convert", FIXTURES / "model", "-o", work / "split", "--format", "gguf", "--shard-size", "500kB")
    files = sorted((work / "split").glob("*.gguf"))
    llama = LlamaCpp(files[0])
    check(len(llama.tokenize("one two")) > 0 and llama.log_probability([1, 2, 3], 4) < 0, f"a split in {len(files)} files loads")


def main():
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        for model in [FIXTURES / "model", *map(Path, sys.argv[2:])]:
            converted(work, model, TYPES)
        widen(FIXTURES / "model", work / "wide")
        converted(work, work / "wide", K_TYPES, 0.02)
        # Pruned or of K types, the fixture's logits are more sensitive to the rounding of activations.
        solved(work, FIXTURES / "model", {f"{name}-gptq": ["--quantize", name] for name in ("q8_0", "q4_0")}, 0.01)
        solved(work, FIXTURES / "model", {"q4_0-2of4": ["--quantize", "q4_0", "--prune", "sparsegpt", "--sparsity", "2:4"]}, 0.02)
        solved(work, work / "wide", {"q4_k-gptq": ["--quantize", "q4_k"]}, 0.02)
        # 98 columns: heads do not divide them, and rows are not whole blocks.
        slices = {"sliced-f32": ["--slice-width", 96, "--dtype", "f32"], "sliced-98": ["--slice-width", 98]}
        sliced(work, FIXTURES / "model", slices, 0.01)
        sliced(work, FIXTURES / "model", {"sliced-q8_0": ["--slice-width", 96, "--quantize", "q8_0"]}, 0.01)
        sentencepiece(work)
        split(work)
        for path in [*sorted(FIXTURES.glob("tiny/*.gguf")), *sorted((FIXTURES.parent / "target/models").glob("*.gguf"))]:
            rewritten(work, path)
    print("llama.cpp loads every type")


if __name__ == "__main__":
    main()
