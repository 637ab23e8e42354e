"""Times one layer of SparseGPT in PyTorch, structured as the published implementation.

    python benches/reference_layer.py --rows 4096 --cols 4096 --tokens 16384 [--sparsity 2:4] [--device cuda] [--json]
    python benches/reference_layer.py --check          # masks against fixtures/golden/sparsegpt, on the CPU

Algorithm 1 of Frantar & Alistarh (arXiv 2301.00774), written from the paper. What makes it comparable with the
published program: f32 throughout and no TF32; the whole of X X^T for each sequence of 2048 tokens, scaled as it arrives;
Cholesky, inverse from it, Cholesky of that; a loop in Python over the columns of blocks of 128; damping by 1 % of the
diagonal's mean. Each phase is timed with the device idle before and after. The first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

BLOCK = 128
DAMP = 0.01
SEQUENCE = 2048
# Sequences that differ, shown in turn, as in `sparsepack bench layer`.
DISTINCT = 2
PHASES = ("gram", "factor", "sweep")
# Elements of updated weights against the goldens, relative to the largest.
TOLERANCE = 1e-3
GOLDEN = Path(__file__).resolve().parent.parent / "fixtures/golden/sparsegpt"


class Hessian:
    """`2/n X^T X` over n sequences, as a running mean."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.sequences = 0

    def add(self, tokens: torch.Tensor) -> None:
        """One sequence `[tokens, columns]` in any float type."""
        self.matrix *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        scaled = tokens.t().float() * (2 / self.sequences) ** 0.5
        self.matrix += scaled.matmul(scaled.t())

    def take(self) -> torch.Tensor:
        """The matrix, which is then the caller's alone and goes when the caller lets go of it."""
        matrix, self.matrix = self.matrix, torch.empty(0)
        return matrix


def factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    diagonal = torch.arange(hessian.shape[0], device=hessian.device)
    hessian[diagonal, diagonal] += damp * hessian.diagonal().mean()
    lower = torch.linalg.cholesky(hessian)
    del hessian
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True)


def lowest(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """Every score up to the one at this fraction: one more than the fraction says, and all ties."""
    threshold = scores.flatten().sort()[0][int(scores.numel() * fraction)]
    return scores <= threshold


def sweep(
    weight: torch.Tensor, upper: torch.Tensor, fraction: float, group: tuple[int, int] | None, block: int
) -> torch.Tensor:
    """Prunes `weight` in place; `group` is how many of how many consecutive columns become zero."""
    columns = weight.shape[1]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        work = weight[:, first:last].clone()
        errors = torch.zeros_like(work)
        factors = upper[first:last, first:last]
        pivots = factors.diagonal()
        if group is None:
            mask = lowest(work**2 / pivots**2, fraction)
        else:
            mask = torch.zeros_like(work, dtype=torch.bool)
        for i in range(last - first):
            if group is not None and i % group[1] == 0:
                zeros, width = group
                scores = work[:, i : i + width] ** 2 / pivots[i : i + width] ** 2
                mask.scatter_(1, i + torch.topk(scores, zeros, dim=1, largest=False)[1], True)
            kept = work[:, i].clone()
            kept[mask[:, i]] = 0
            error = (work[:, i] - kept) / pivots[i]
            work[:, i:] -= error.unsqueeze(1).matmul(factors[i, i:].unsqueeze(0))
            work[:, i] = kept
            errors[:, i] = error
        weight[:, first:last] = work
        weight[:, last:] -= errors.matmul(upper[first:last, last:])
    return weight


def solve(
    weight: torch.Tensor,
    hessian: Hessian,
    fraction: float,
    group: tuple[int, int] | None,
    clock: Callable[[str], None],
    *,
    damp: float = DAMP,
    block: int = BLOCK,
) -> torch.Tensor:
    """Prunes a copy of `weight`, and takes the matrix of `hessian`."""
    weight = weight.float().clone()
    dead = hessian.matrix.diagonal() == 0
    hessian.matrix[dead, dead] = 1
    weight[:, dead] = 0
    upper = factor(hessian.take(), damp)
    clock("factor")
    weight = sweep(weight, upper, fraction, group, block)
    clock("sweep")
    return weight


def parse(sparsity: str) -> tuple[float, tuple[int, int] | None]:
    """`50%`, or kept:group like `2:4`."""
    if ":" in sparsity:
        kept, width = map(int, sparsity.split(":"))
        return (width - kept) / width, (width - kept, width)
    return float(sparsity.removesuffix("%")) / 100, None


def activations(columns: int, tokens: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Correlated features whose scale decays to a sixteenth; each token of mean square one."""
    noise = torch.randn(tokens, columns, device=device)
    noise[:, 1:] = 0.5 * noise[:, :-1] + 0.75**0.5 * noise[:, 1:]
    noise /= 1 + torch.arange(columns, device=device) * (15 / max(columns, 2))
    return (noise / noise.square().mean(1, keepdim=True).sqrt()).to(dtype)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    torch.manual_seed(1)
    fraction, group = parse(arguments.sparsity)
    # What the published program keeps activations in.
    dtype = torch.float16 if cuda else torch.float32
    lengths = [SEQUENCE] * (arguments.tokens // SEQUENCE)
    lengths += [arguments.tokens % SEQUENCE] if arguments.tokens % SEQUENCE else []
    distinct = [activations(arguments.cols, length, device, dtype) for length in dict.fromkeys(lengths)]
    if len(lengths) > 1 and lengths[1] == SEQUENCE:
        distinct.insert(1, activations(arguments.cols, SEQUENCE, device, dtype))
    whole = [x for x in distinct if len(x) == SEQUENCE]
    weight = torch.randn(arguments.rows, arguments.cols, device=device) * 0.02
    rounds: list[dict[str, float]] = []
    for _ in range(1 + arguments.repeat):
        seconds: dict[str, float] = {}
        start = 0.0

        def clock(phase: str) -> None:
            nonlocal start
            if cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds[phase], start = now - start, now

        hessian = Hessian(arguments.cols, device)
        clock("start")
        for index, length in enumerate(lengths):
            hessian.add(whole[index % len(whole)] if length == SEQUENCE else distinct[-1])
        clock("gram")
        solved = solve(weight, hessian, fraction, group, clock)
        zeros = (solved == 0).float().mean().item()
        del solved
        rounds.append({phase: seconds[phase] for phase in PHASES})
    return {
        "rows": arguments.rows,
        "cols": arguments.cols,
        "tokens": arguments.tokens,
        "sparsity": arguments.sparsity,
        "zeros": zeros,
        "repeat": arguments.repeat,
        "compute": f"{torch.cuda.get_device_name(device) if cuda else 'CPU'}, torch {torch.__version__}, f32",
        "phases": [
            {"phase": phase, "seconds": statistics.median(one[phase] for one in rounds[1:])} for phase in PHASES
        ],
    }


def check() -> None:
    """Every golden case: equal masks, and weights within the tolerance."""
    from safetensors import safe_open

    cases = sorted(GOLDEN.glob("*.safetensors"))
    if not cases:
        sys.exit(f"no cases in {GOLDEN}")
    for path in cases:
        with safe_open(path, "pt") as golden:
            about = golden.metadata()
            weight, pruned = golden.get_tensor("weight"), golden.get_tensor("pruned")
            hessian = Hessian(weight.shape[1], weight.device)
            hessian.matrix = golden.get_tensor("hessian")
        zeroed, width = int(about["n"]), int(about["m"])
        solved = solve(
            weight,
            hessian,
            float(about["sparsity"]),
            (zeroed, width) if width else None,
            lambda _: None,
            damp=float(about["percdamp"]),
            block=int(about["block_size"]),
        )
        masks = int(((solved == 0) != (pruned == 0)).sum())
        difference = ((solved - pruned).abs().max() / pruned.abs().max()).item()
        print(f"{path.stem}: {masks} weights in one mask only, largest difference {difference:.1e}")
        if masks or difference > TOLERANCE:
            sys.exit(f"{path.stem} is not what the recorded reference computes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times one layer of SparseGPT in PyTorch.")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--cols", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="compare with the recorded cases and time nothing")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        if arguments.check:
            return check()
        if not all((arguments.rows, arguments.cols, arguments.tokens)) or arguments.repeat < 1:
            parser.error("--rows, --cols and --tokens are needed, and at least one round")
        result = measure(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['rows']} x {result['cols']}, {result['sparsity']}, {result['tokens']} tokens: {result['compute']}")
    for phase in result["phases"]:
        print(f"  {phase['phase']:<8} {phase['seconds']:10.4f} s")


if __name__ == "__main__":
    main()
