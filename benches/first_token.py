"""What quantization does to the first token of a window, which serves as the attention sink where no BOS is added.

    python benches/first_token.py MODEL TEXT QUANTIZED...

MODEL: the dense Hugging Face directory; QUANTIZED: directories that reference_gptq.py saved from it (--bits 4). For each role of a linear
prints the output error relative to the output, ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖², on the first token of the text's first window and on the
others, with dense inputs, as a mean over the blocks; then the perplexity of the first four windows, as it is and with the dense q, k and v
for the first token alone.
"""
import collections, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from reference_gptq import load_quantized, perplexity, token_ids

WINDOW, WINDOWS, BITS = 2048, 4, 4
SINK = ("q_proj", "k_proj", "v_proj")


def linears(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"}


def output_errors(dense, quantized, ids):
    """Mean relative error by role, part of the window and model."""
    sums, hooks = collections.defaultdict(float), []
    parts = {"first": slice(0, 1), "others": slice(1, None)}

    def watch(name, linear):
        def hook(_, inputs, __):
            for part, tokens in parts.items():
                x = inputs[0][0][tokens]
                energy = (x @ linear.weight.t()).square().sum()
                for model, weights in quantized.items():
                    lost = (x @ (weights[name].weight - linear.weight).t()).square().sum()
                    sums[name.split(".")[-1], part, model] += (lost / energy).item() / dense.config.num_hidden_layers
        hooks.append(linear.register_forward_hook(hook))

    for name, linear in linears(dense).items():
        watch(name, linear)
    with torch.no_grad():
        dense.model(ids[:, :WINDOW])
    for hook in hooks:
        hook.remove()
    return sums


def keep_first_token(model, dense):
    """Lets the dense q, k and v answer for the first token."""
    def watch(linear, exact):
        def hook(_, inputs, output):
            output = output.clone()
            output[:, 0] = inputs[0][:, 0] @ exact.t()
            return output
        linear.register_forward_hook(hook)

    exact = linears(dense)
    for name, linear in linears(model).items():
        if name.split(".")[-1] in SINK:
            watch(linear, exact[name].weight.to(linear.weight.dtype))


def main():
    source, text, *directories = sys.argv[1:]
    ids = token_ids(AutoTokenizer.from_pretrained(source), text)
    load = lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense, models = load(), {}
    for directory in directories:
        models[directory] = load()
        load_quantized(models[directory], directory, BITS)
    sums = output_errors(dense, {name: linears(model) for name, model in models.items()}, ids)
    for (role, part, model), error in sorted(sums.items()):
        print(f"{role:10} {part:7} {error:.4f}  {model}")
    print("dense perplexity", perplexity(dense.bfloat16(), ids, WINDOW, WINDOWS))
    for name, model in models.items():
        model = model.bfloat16()
        print(name, "perplexity", perplexity(model, ids, WINDOW, WINDOWS))
        keep_first_token(model, dense)
        print(name, "perplexity, first token dense", perplexity(model, ids, WINDOW, WINDOWS))


if __name__ == "__main__":
    main()
