"""Time of 2:4 against dense products on a GPU, at 1, 128 and 2048 tokens.

    python python/bench_gpu.py [--dtype bf16] [--shape ROWSxCOLUMNS ...]

Prints a line for each matrix, number of tokens and backend: the median of 50 runs after 10 that are not
counted, in microseconds, with weights of the shapes of a Llama 7B model unless others are named. Between
runs the L2 cache is overwritten, since a model's next layer finds nothing of this one there.
"""

from __future__ import annotations

import argparse
import sys

import torch

from sparsepack import semi_structured
from sparsepack.encodings import Sparse24
from sparsepack.semi_structured import Hardware

TOKENS = (1, 128, 2048)
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
WARM_UP, RUNS = 10, 50
CACHE_BYTES = 256 << 20


def random_components(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """A random 2:4 matrix as `sparse24` stores it."""
    legal = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8, device=device)
    nibbles = legal[torch.randint(0, 6, (rows, columns // 4), device=device)]
    values = torch.randn((rows, columns // 2), device=device).to(dtype)
    return {".values": values, ".metadata": nibbles[:, ::2] | nibbles[:, 1::2] << 4}


def microseconds(weight: torch.Tensor, activations: torch.Tensor) -> float:
    """Median time of one product."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=activations.device)
    times = []
    for run in range(WARM_UP + RUNS):
        cache.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.nn.functional.linear(activations, weight)
        end.record()
        end.synchronize()
        if run >= WARM_UP:
            times.append(start.elapsed_time(end) * 1000)
    return sorted(times)[RUNS // 2]


def measure(shape: tuple[int, int], dtype: torch.dtype, hardware: Hardware) -> None:
    encoding = Sparse24(dtype, shape)
    parts = random_components(*shape, dtype, hardware.device)
    weights: dict[str, torch.Tensor] = {"dense": encoding.decode(parts)}
    for backend in (semi_structured.CUSPARSELT, semi_structured.CUTLASS):
        chosen, why = semi_structured.choose(hardware, encoding, dtype, backend)
        if chosen:
            weights[backend] = semi_structured.build(backend, encoding, parts, hardware.device, dtype)
        else:
            print(f"{shape[0]}x{shape[1]}: no {why}")
    for tokens in TOKENS:
        activations = torch.randn((tokens, shape[1]), device=hardware.device).to(dtype)
        dense = microseconds(weights["dense"], activations)
        expected = torch.nn.functional.linear(activations, weights["dense"])
        for backend, weight in weights.items():
            time = dense if backend == "dense" else microseconds(weight, activations)
            error = (torch.nn.functional.linear(activations, weight) - expected).abs().max() / expected.abs().max()
            print(
                f"{shape[0]:6}x{shape[1]:<6} {tokens:5} tokens  {backend:10}  {time:9.1f} us  "
                f"{dense / time:5.2f} of dense's speed  {2 * tokens * shape[0] * shape[1] / time / 1e6:7.1f} "
                f"dense-equivalent TFLOP/s  error {error:.1e}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of 2:4 against dense products on a GPU.")
    parser.add_argument("--dtype", choices=["bf16", "f16"], default="bf16")
    parser.add_argument("--shape", action="append", metavar="ROWSxCOLUMNS")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shape or ()] or SHAPES
    hardware = Hardware.of(torch.device("cuda", 0))
    if (problem := hardware.problem()) is not None:
        sys.exit(f"no measurement: {problem}")
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {arguments.dtype}")
    with torch.no_grad():
        for rows, columns in shapes:
            measure((rows, columns), {"bf16": torch.bfloat16, "f16": torch.float16}[arguments.dtype], hardware)


if __name__ == "__main__":
    main()
