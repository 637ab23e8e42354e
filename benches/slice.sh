#!/usr/bin/env bash
# Sliced forms of a model: parameters, bytes and perplexity, for the tables of the README.
#
#     benches/slice.sh SPARSEPACK MODEL_DIRECTORY WORK_DIRECTORY [FILTER]
#
# MODEL_DIRECTORY is the bf16 Hugging Face form of SmolLM2-135M (`convert` of the GGUF file that
# fixtures/make/fetch_smollm2.sh brings). Calibration: the first SAMPLES (32) windows of 2048 tokens of
# fixtures/text/calibration.txt; perplexity on fixtures/text/heldout.txt. FILTER is a pattern of row names. Prints
# name, hidden size, parameters, bytes, bytes a decoded token reads, perplexity, and seconds of the slice.
set -euo pipefail
sparsepack=$1 model=$2 work=$3 filter=${4:-.}
texts=$(cd "$(dirname "$0")/../fixtures/text" && pwd)

row() {
    local name=$1 out=$work/out
    shift
    [[ $name =~ $filter ]] || return 0
    rm -rf "$out"
    local sizes perplexity
    sizes=$("$sparsepack" --quiet convert "$model" -o "$out" --json --slice-multiple 32 "$@" \
        --calibration "$texts/calibration.txt" --samples "${SAMPLES:-32}" --seq-len 2048 | python3 -c '
import json, sys
report = json.load(sys.stdin)
after = report["slice"]["after"]
columns = [after[key] for key in ("hidden_size", "parameters", "bytes", "decode_bytes")]
print(" | ".join(map(str, columns)), "|", round(report["seconds"], 1), "s")')
    perplexity=$("$sparsepack" --quiet eval "$out" --text "$texts/heldout.txt" --window 2048 --json |
        python3 -c 'import json,sys; print("%.2f" % json.load(sys.stdin)["perplexity"])')
    echo "$name | $perplexity | $sizes"
}

for percent in 10 15 20 25 30; do
    row "shared $percent%" --slice $percent%
    row "shared $percent%, not fitted" --slice $percent% --slice-correction none
    row "block $percent%" --slice $percent% --basis block
    row "block $percent%, head too" --slice $percent% --basis block --slice-head
done
# About the parameters of the shared basis at 10, 15 and 20 %.
for width in 448 416 384; do
    row "block at $width" --slice-width $width --basis block
done
