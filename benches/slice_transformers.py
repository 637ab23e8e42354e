"""Prefill and decode of Hugging Face directories in transformers on the CPU, in turn.

    python benches/slice_transformers.py DENSE SLICED...

For each directory: its class, hidden size, tokens a second of decoding (64 tokens, KV cache) and of prefill (512 tokens), in
bf16, medians of five rounds that take the models in turn.
"""

import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT, NEW, ROUNDS = 512, 64, 5


def measure(model: torch.nn.Module) -> tuple[float, float]:
    ids = torch.arange(PROMPT)[None] % 1000 + 100
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(ids, use_cache=True)
        prefill = PROMPT / (time.perf_counter() - start)
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(NEW):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return NEW / (time.perf_counter() - start), prefill


def main() -> None:
    models = {
        path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for path in sys.argv[1:]
    }
    rates: dict[str, list[tuple[float, float]]] = {path: [] for path in models}
    for _ in range(ROUNDS):
        for path, model in models.items():
            rates[path].append(measure(model))
    for path, model in models.items():
        decode, prefill = (statistics.median(column) for column in zip(*rates[path], strict=True))
        kind = type(model).__name__
        print(f"{path} | {kind} | {model.config.hidden_size} | {decode:.1f} | {prefill:.0f}")


if __name__ == "__main__":
    main()
