#!/usr/bin/env bash
# Linears solved on ggml's grids against llama-quantize's, both measured by llama-perplexity.
#
#     benches/llama_quantize.sh SPARSEPACK LLAMA_BIN MODEL_DIRECTORY WORK_DIRECTORY TYPE...
#
# LLAMA_BIN has llama-quantize and llama-perplexity. The embeddings are Q8_0 in every file, so files of a type
# have the same size. Calibration and text as in quantize.sh; llama-perplexity with windows of 512.
set -euo pipefail
sparsepack=$1 llama=$2 model=$3 work=$4
shift 4
texts=$(cd "$(dirname "$0")/../fixtures/text" && pwd)
mkdir -p "$work"

measure() {
    # -nr: without repacking, which some builds do for instructions that the processor lacks.
    "$llama/llama-perplexity" -m "$1" -f "$texts/heldout.txt" -c 512 --chunks "${CHUNKS:--1}" -nr 2>&1 |
        sed -n 's/.*Final estimate: PPL = \([0-9.]*\).*/\1/p'
}

row() { echo "$1 | $(measure "$2") | $(stat -c %s "$2")"; }

if [[ ! -f $work/bf16/model.gguf ]]; then
    "$sparsepack" --quiet convert "$model" -o "$work/bf16" --format gguf > /dev/null
fi
row bf16 "$work/bf16/model.gguf"
for type in "$@"; do
    theirs=$work/theirs-$type.gguf
    "$llama/llama-quantize" --pure --token-embedding-type q8_0 "$work/bf16/model.gguf" "$theirs" "${type^^}" > /dev/null 2>&1
    row "$type llama-quantize" "$theirs"
    rm -rf "$work/ours"
    "$sparsepack" --quiet convert "$model" -o "$work/ours" --format gguf --quantize "$type" --dtype q8_0 \
        --calibration "$texts/calibration.txt" --samples 32 --seq-len 2048 > /dev/null
    row "$type solved" "$work/ours/model.gguf"
done
