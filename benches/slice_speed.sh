#!/usr/bin/env bash
# Decode and prefill of sliced models in llama.cpp, next to the dense one in the same run.
#
#     benches/slice_speed.sh SPARSEPACK LLAMA_BIN MODEL_DIRECTORY WORK_DIRECTORY [TYPE...]
#
# LLAMA_BIN has llama-bench. For each TYPE (f16 and q8_0) and each of 0, 10, 15, 20, 25 and 30 %: file type, share,
# bytes a decoded token reads, tokens a second of decoding (128 tokens) and of prefill (512 tokens), medians of ROUNDS (5)
# rounds that take the models in turn, and the share of the promised gain of decoding that was had: seconds saved
# over those that the bytes saved would take at the dense model's rate.
set -euo pipefail
sparsepack=$1 llama=$2 model=$3 work=$4
shift 4
types=("${@:-f16}")
[[ $# -eq 0 ]] && types=(f16 q8_0)
texts=$(cd "$(dirname "$0")/../fixtures/text" && pwd)
mkdir -p "$work"
for type in "${types[@]}"; do
    for percent in 0 10 15 20 25 30; do
        out=$work/$type-$percent
        [[ -f $out/manifest.json ]] && continue
        rm -rf "$out"
        slice=()
        # Speed does not depend on the values: the shortest slice will do.
        [[ $percent = 0 ]] || slice=(--slice $percent% --slice-multiple 32 --slice-correction none
            --calibration "$texts/calibration.txt" --samples 1 --seq-len 2048)
        "$sparsepack" --quiet convert "$model" -o "$out" --format gguf --dtype "$type" "${slice[@]}" > /dev/null
    done
    python3 - "$llama/llama-bench" "$work" "$type" "${ROUNDS:-5}" <<'PYTHON'
import json
import pathlib
import statistics
import subprocess
import sys

bench, work, kind, rounds = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
shares = [0, 10, 15, 20, 25, 30]
rates = {(share, test): [] for share in shares for test in ("decode", "prefill")}
for _ in range(rounds):
    for share in shares:
        # Without repacking, which some builds do for instructions that the processor lacks.
        command = [bench, "--repack", "0", "-m", work / f"{kind}-{share}/model.gguf"]
        command += ["-p", "512", "-n", "128", "-r", "1", "-o", "json"]
        for test in json.loads(subprocess.run(command, check=True, capture_output=True).stdout):
            rates[share, "decode" if test["n_gen"] else "prefill"].append(test["avg_ts"])


def decode_bytes(share: int) -> int:
    tensors = json.loads((work / f"{kind}-{share}/manifest.json").read_text())["tensors"]
    tied = not any(tensor["name"] == "lm_head.weight" for tensor in tensors)
    total = 0
    for tensor in tensors:
        size = sum(component["bytes"] for component in tensor["components"])
        looked_up = tensor["name"] == "model.embed_tokens.weight" and not tied
        total += size // tensor["shape"][0] if looked_up else size
    return total


dense, dense_bytes = statistics.median(rates[0, "decode"]), decode_bytes(0)
for share in shares:
    decode, prefill = (statistics.median(rates[share, test]) for test in ("decode", "prefill"))
    size = decode_bytes(share)
    gain = "" if share == 0 else "%.0f %%" % (100 * (1 - dense / decode) / (1 - size / dense_bytes))
    print(f"{kind} | {share} % | {size} | {decode:.1f} | {prefill:.0f} | {gain}")
PYTHON
done
