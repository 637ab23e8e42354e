"""Tables of layer times on one device, sparsepack beside PyTorch, and the time of OPT-175B that follows from them.

    python benches/gpu_table.py --program target/release/sparsepack [--device cuda:0] [--quick] [--out RAW.json]

Runs `sparsepack bench layer` and benches/reference_layer.py one after the other, on layers of `--shapes` at
`--sparsities`, and prints Markdown. Needs Python, torch for the reference (`--without-reference`: none), and the
program; no Rust. Nothing starts after `--budget` seconds, and a measurement that runs over it is ended: what is missing
is said to be.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "benches/reference_layer.py"

SHAPES = ["4096x4096", "11008x4096", "12288x12288", "49152x12288", "12288x49152"]
SOLVED = ("gram", "factor", "sweep")
OURS = ("upload", "gram", "factor", "sweep", "error", "pack")

# OPT-175B (Zhang et al. 2022), calibrated as SparseGPT's authors do.
BLOCKS, HIDDEN, INNER = 96, 12288, 49152
TOKENS, WINDOW = 128 * 2048, 2048
VOCABULARY, POSITIONS = 50272, 2050
# Queries, keys, values and output projection; the two matrices of the MLP.
LAYERS = ((HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
DISK = 2e9

Result = dict[str, object]


@dataclass(frozen=True)
class Case:
    rows: int
    cols: int
    sparsity: str

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols}, {self.sparsity}"


class Bench:
    """Runs measurements until the budget is spent."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.end = time.monotonic() + arguments.budget
        self.environment = dict(os.environ)
        spec = importlib.util.spec_from_file_location("cuda_libraries", ROOT / ".ci/cuda_libraries.py")
        libraries = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(libraries)
        self.environment["LD_LIBRARY_PATH"] = ":".join(libraries.folders())

    def run(self, command: list[str]) -> Result:
        """What the command printed as JSON, or `error`."""
        left = self.end - time.monotonic()
        if left <= 0:
            return {"error": "not run: no time left"}
        started = time.monotonic()
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=left, env=self.environment)
        except subprocess.TimeoutExpired:
            return {"error": f"ended after {left:.0f} s"}
        print(f"{' '.join(command[:2])} ...: {time.monotonic() - started:.1f} s", file=sys.stderr)
        if ran.returncode != 0:
            lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
            return {"error": lines[-1]}
        return json.loads(ran.stdout)

    def ours(self, case: Case) -> Result:
        a = self.arguments
        device = ["--device", a.device, "--compute", a.compute]
        return self.run([str(a.program), "bench", "layer", *self.size(case), *device, "--json"])

    def reference(self, case: Case) -> Result:
        device = "cpu" if self.arguments.device == "cpu" else self.arguments.device
        return self.run([sys.executable, str(REFERENCE), *self.size(case), "--device", device, "--json"])

    def size(self, case: Case) -> list[str]:
        a = self.arguments
        size = ["--rows", case.rows, "--cols", case.cols, "--tokens", a.tokens, "--repeat", a.repeat]
        return [str(part) for part in [*size, "--sparsity", case.sparsity]]


def seconds(result: Result | None, phase: str) -> float | None:
    phases = (result or {}).get("phases", [])
    return next((one["seconds"] for one in phases if one["phase"] == phase), None)


def at_all_tokens(result: Result | None) -> dict[str, float] | None:
    """Seconds by phase with the Gram matrix of all of OPT-175B's calibration tokens, in proportion."""
    if not result or "error" in result:
        return None
    times = {one["phase"]: one["seconds"] for one in result["phases"]}
    return times | {"gram": times["gram"] * TOKENS / result["tokens"]}


def cell(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def ratio(ours: float | None, theirs: float | None) -> str:
    return f"{theirs / ours:.1f}" if ours and theirs else ""


def layers_table(cases: list[Case], ours: dict[Case, Result], theirs: dict[Case, Result]) -> list[str]:
    lines = [
        "| layer (out x in) | " + " | ".join(OURS) + " | PyTorch: gram | factor | sweep | sweep, times faster "
        "| gram, factor and sweep at 262144 tokens, times faster |",
        "|---" * (len(OURS) + 6) + "|",
    ]
    for case in cases:
        mine, other = ours.get(case), theirs.get(case)
        cells = [cell(seconds(mine, phase), ".4f") for phase in OURS]
        cells += [cell(seconds(other, phase), ".4f") for phase in SOLVED]
        cells.append(ratio(seconds(mine, "sweep"), seconds(other, "sweep")))
        full = [at_all_tokens(result) for result in (mine, other)]
        whole = [sum(times[phase] for phase in SOLVED) if times else None for times in full]
        lines.append(f"| {case} | " + " | ".join([*cells, ratio(*whole)]) + " |")
    return lines


def rates_table(cases: list[Case], ours: dict[Case, Result]) -> list[str]:
    lines = ["| layer (out x in) | " + " | ".join(OURS) + " |", "|---" * (len(OURS) + 1) + "|"]
    for case in cases:
        cells = []
        for phase in OURS:
            found = (one for one in ours.get(case, {}).get("phases", []) if one["phase"] == phase)
            one = next(found, {})
            if (speed := one.get("tflops_per_sec")) is not None:
                cells.append(f"{speed:.2f} TFLOP/s ({100 * one['of_ceiling']:.0f} %)")
            elif (speed := one.get("gbytes_per_sec")) is not None:
                cells.append(f"{speed:.1f} GB/s")
            else:
                cells.append("")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


def kept_bytes() -> float:
    """Of one block of OPT-175B, what goes to the host between passes and comes back (src/calibration/hidden.rs): attention
    outputs and MLP activations in the type of products, bf16. The residual stream stays on a device of 80 GB."""
    return TOKENS * (HIDDEN + INNER) * 2


def projection(sparsity: str, ours: dict[Case, Result], theirs: dict[Case, Result]) -> list[str]:
    """Seconds of all of OPT-175B by phase: measured layers, and counts over measured rates for the rest."""

    def block(results: dict[Case, Result], phase: str) -> float | None:
        square, wide, deep = (
            at_all_tokens(results.get(Case(rows, cols, sparsity))) for rows, cols in LAYERS
        )
        if not (square and wide and deep) or phase not in square:
            return None
        # One Hessian for queries, keys and values, one for the output projection, one for each MLP matrix.
        times = 2 if phase in ("gram", "factor") else 4
        return times * square[phase] + wide[phase] + deep[phase]

    weights = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER
    source = 2 * (BLOCKS * weights + (VOCABULARY + POSITIONS) * HIDDEN)
    rows: list[tuple[str, float | None, float | None]] = [
        (phase, block(ours, phase), block(theirs, phase)) for phase in OURS
    ]
    measured = ours.get(Case(HIDDEN, INNER, sparsity))
    if measured and "error" not in measured:
        attention = 2 * WINDOW * HIDDEN
        flops = TOKENS * (2 * weights + attention)
        rows.append(("forward, at the ceiling", flops / measured["gemm_ceiling_flops_per_sec"], None))
        rates = {one["phase"]: one.get("gbytes_per_sec") for one in measured["phases"]}
        rows.append(("kept activations, both ways at the rate of upload", 2 * kept_bytes() / rates["upload"] / 1e9, None))
    lines = ["| phase | sparsepack, s | PyTorch, s |", "|---|---|---|"]
    for phase, mine, other in rows:
        times = [None if one is None else one * BLOCKS for one in (mine, other)]
        lines.append(f"| {phase} | {cell(times[0], '.0f')} | {cell(times[1], '.0f')} |")
    if any(mine is None for _, mine, _ in rows) or not measured or "error" in measured:
        return [*lines, "", "Not all of its layers were measured: no sum."]
    packed = [ours[Case(rows, cols, sparsity)]["packed_bytes"] for rows, cols in LAYERS]
    written = source - BLOCKS * (2 * weights - (4 * packed[0] + packed[1] + packed[2]))
    lines.append(f"| reading {source / 1e9:.0f} GB at 2 GB/s | {source / DISK:.0f} | |")
    lines.append(f"| writing {written / 1e9:.0f} GB at 2 GB/s | {written / DISK:.0f} | |")
    total = sum(mine * BLOCKS for _, mine, _ in rows) + (source + written) / DISK
    lines.append(f"| all, nothing at the same time | {total:.0f} ({total / 3600:.2f} h) | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of layer times on one device.")
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--compute", default="auto", choices=["auto", "f32", "bf16"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLS")
    parser.add_argument("--sparsities", nargs="+", default=["2:4", "50%"])
    parser.add_argument("--tokens", type=int, help="[default: 16384; 4096 if quick]")
    parser.add_argument("--repeat", type=int, help="[default: 3; 1 if quick]")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all [default: 540]")
    parser.add_argument("--without-reference", action="store_true")
    parser.add_argument("--out", type=Path, help="where the measurements go as JSON")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (4096 if arguments.quick else 16384)
    arguments.repeat = arguments.repeat or (1 if arguments.quick else 3)
    arguments.program = arguments.program.resolve()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    cases = [Case(rows, cols, sparsity) for sparsity in arguments.sparsities for rows, cols in shapes]

    bench = Bench(arguments)
    ours, theirs = {}, {}
    for case in cases:
        ours[case] = bench.ours(case)
        if not arguments.without_reference:
            theirs[case] = bench.reference(case)
        if arguments.out:
            raw = [{"case": str(one), "sparsepack": ours[one], "pytorch": theirs.get(one)} for one in ours]
            arguments.out.write_text(json.dumps(raw, indent=1))

    failures = [
        f"* {name}, {case}: {result['error']}"
        for name, results in (("sparsepack", ours), ("PyTorch", theirs))
        for case, result in results.items()
        if "error" in result
    ]
    done = [result for result in ours.values() if "error" not in result]
    for result in [*done[:1], *[result for result in theirs.values() if "error" not in result][:1]]:
        print(f"* {result['compute']}")
    for result in done[:1]:
        print(f"* ceiling {result['gemm_ceiling_flops_per_sec'] / 1e12:.1f} TFLOP/s")
    print(f"* {arguments.tokens} tokens, median of {arguments.repeat}; seconds\n")
    print("\n".join([*layers_table(cases, ours, theirs), "", *rates_table(cases, ours)]))
    for sparsity in arguments.sparsities:
        print(f"\nOPT-175B, {sparsity}, {TOKENS} tokens:\n")
        print("\n".join(projection(sparsity, ours, theirs)))
    if failures:
        print("\nMissing:\n\n" + "\n".join(failures))
        sys.exit(1)


if __name__ == "__main__":
    main()
