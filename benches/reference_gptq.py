"""llm-compressor's GPTQ and round-to-nearest, and the perplexity of what they save: the reference of `sparsepack convert --quantize`.

    pip install llmcompressor==0.14.0.1 torch==2.10.0 transformers==5.17.0
    python benches/reference_gptq.py MODEL --calibration calibration.txt --text heldout.txt --method gptq --bits 4 --group 64 --save DIR

Prints one JSON line. The model is a Hugging Face directory and is quantized in the dtype it is stored in. Calibration: the first
`--samples` windows of `--seq-len` tokens of the text, in order, no special tokens. Perplexity: the whole text tokenized once without
special tokens, windows without overlap, each predicting its tokens 2..n; the saved checkpoint is read back, each quantized weight is
scale * (code - zero) in float32 by compressed-tensors' own unpacking, and everything is computed in float32 (`--compute bf16`: weights
rounded to bfloat16 and computed in it, losses in float32). `--method dense` measures the model itself.
"""
import argparse, json, math, pathlib, resource, time
from importlib.metadata import version
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

# Suffixes of the tensors that stand for one quantized weight.
PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", choices=("dense", "rtn", "gptq"), required=True)
    parser.add_argument("--calibration")
    parser.add_argument("--text", required=True)
    parser.add_argument("--save", help="directory for the quantized checkpoint")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=0, help="columns to a scale; 0: one scale for each row")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--actorder", choices=("default", "none", "static"), default="none", help="default: the release's")
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--observer", help="of the weights; left out: the release's own default")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="measure only so many")
    parser.add_argument("--compute", choices=("f32", "bf16"), default="f32", help="of the perplexity")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.method != "dense" and not args.save:
        parser.error("--save is needed")
    if args.method == "gptq" and not args.calibration:
        parser.error("--calibration is needed")
    return args


def token_ids(tokenizer, path):
    return tokenizer(pathlib.Path(path).read_text(), return_tensors="pt", add_special_tokens=False).input_ids


def quantize(args):
    """Saves the quantized checkpoint; seconds of the quantization alone."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    weights = {"num_bits": args.bits, "type": "int", "symmetric": not args.asymmetric, "strategy": "group" if args.group else "channel"}
    if args.group:
        weights["group_size"] = args.group
    if args.observer:
        weights["observer"] = args.observer
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    if args.method == "rtn":
        recipe, data = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]), {}
    else:
        order = {} if args.actorder == "default" else {"actorder": None if args.actorder == "none" else args.actorder}
        recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=args.damp, **order)
        ids = token_ids(tokenizer, args.calibration)
        windows = [ids[0, i * args.seq_len:(i + 1) * args.seq_len].tolist() for i in range(args.samples)]
        assert len(windows[-1]) == args.seq_len, "the calibration text is too short"
        data = {"dataset": Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * args.seq_len] * args.samples}),
                "num_calibration_samples": args.samples, "max_seq_length": args.seq_len, "shuffle_calibration_samples": False}
    start, cpu = time.time(), time.process_time()
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **data)
    took = {"quantize_wall_s": round(time.time() - start, 1), "quantize_cpu_s": round(time.process_time() - cpu, 1)}
    model.save_pretrained(args.save, save_compressed=True)
    tokenizer.save_pretrained(args.save)
    return took


def dequantized(parts, bits):
    """f32 weight of one linear."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    scale = parts["weight_scale"].float()
    if "weight_packed" in parts:
        shape = torch.Size(parts["weight_shape"].tolist())
        codes = unpack_from_int32(parts["weight_packed"], bits, shape).float()
    else:
        codes = parts["weight"].float()
    zero = torch.zeros_like(scale)
    if "weight_zero_point" in parts:
        stored = parts["weight_zero_point"]
        zero = (unpack_from_int32(stored, bits, scale.shape, packed_dim=0) if stored.dtype == torch.int32 else stored).float()
    if "weight_g_idx" in parts:
        columns = parts["weight_g_idx"].long()
    else:
        columns = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
    return scale[:, columns] * (codes - zero[:, columns])


def load_quantized(model, directory, bits):
    """The saved tensors into a dense f32 model of the same architecture; how many linears were quantized, and bytes of the weights."""
    tensors, size = {}, 0
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        size += path.stat().st_size
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    state, quantized = {}, 0
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if f"{module}.weight_scale" not in tensors:
            state[name] = tensor.float()
        elif part == "weight_scale":
            parts = {p: tensors[f"{module}.{p}"] for p in PARTS if f"{module}.{p}" in tensors}
            state[f"{module}.weight"] = dequantized(parts, bits)
            quantized += 1
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return quantized, size


@torch.no_grad()
def perplexity(model, ids, window, limit):
    count = ids.shape[1] // window
    count = min(count, limit) if limit else count
    loss = 0.0
    for i in range(count):
        x = ids[:, i * window:(i + 1) * window]
        loss += torch.nn.functional.cross_entropy(model(x).logits[0, :-1].float(), x[0, 1:], reduction="sum").item()
    return {"perplexity": round(math.exp(loss / (count * (window - 1))), 4), "windows": count, "window": window, "tokens": ids.shape[1]}


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    keys = {"dense": (), "rtn": ("bits", "group", "asymmetric", "observer"),
            "gptq": ("bits", "group", "asymmetric", "observer", "actorder", "damp", "samples", "seq_len")}
    result = {"method": args.method} | {k: getattr(args, k) for k in keys[args.method]}
    if args.method != "dense":
        result |= quantize(args)
        result["quantize_max_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.method != "dense":
        result["linears"], result["safetensors_bytes"] = load_quantized(model, args.save, args.bits)
    model = model.to(torch.bfloat16) if args.compute == "bf16" else model
    start = time.time()
    result |= {"compute": args.compute} | perplexity(model, token_ids(AutoTokenizer.from_pretrained(args.model), args.text), args.window, args.windows)
    result["perplexity_wall_s"] = round(time.time() - start, 1)
    result |= {k: version(k) for k in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
