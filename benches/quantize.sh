#!/usr/bin/env bash
# Perplexity and stored bytes of quantized and pruned forms of a model: the tables of the README.
#
#     benches/quantize.sh SPARSEPACK MODEL_DIRECTORY WORK_DIRECTORY [FILTER]
#
# MODEL_DIRECTORY is the bf16 Hugging Face form of SmolLM2-135M (`convert` of the GGUF file that
# fixtures/make/fetch_smollm2.sh brings). Calibration: the first 32 windows of 2048 tokens of
# fixtures/text/calibration.txt; perplexity on all of fixtures/text/heldout.txt. FILTER is a pattern of
# row names. Prints name, perplexity, bytes of the linears of the blocks, and seconds of the conversion.
set -euo pipefail
sparsepack=$1 model=$2 work=$3 filter=${4:-.}
texts=$(cd "$(dirname "$0")/../fixtures/text" && pwd)
calibrated=(--calibration "$texts/calibration.txt" --samples 32 --seq-len 2048)

row() {
    local name=$1 out=$work/out
    shift
    [[ $name =~ $filter ]] || return 0
    rm -rf "$out"
    local start=$SECONDS
    "$sparsepack" --quiet convert "$model" -o "$out" "$@" > /dev/null
    local seconds=$((SECONDS - start))
    local perplexity bytes
    perplexity=$("$sparsepack" --quiet eval "$out" --text "$texts/heldout.txt" --window 2048 --json |
        python3 -c 'import json,sys; print("%.2f" % json.load(sys.stdin)["perplexity"])')
    bytes=$(python3 -c '
import json, sys
tensors = json.load(open(sys.argv[1]))["tensors"]
print(sum(c["bytes"] for t in tensors if "_proj." in t["name"] for c in t["components"]))' "$out/manifest.json")
    echo "$name | $perplexity | $bytes | $seconds s"
}

g64=(--format packed --group-size 64)
rtn=(--quantizer rtn --scales minmax)
row "dense" --format safetensors
for bits in 8 4 3; do
    group=("${g64[@]}")
    [[ $bits = 8 ]] && group=(--format packed --group-size channel)
    row "int$bits to nearest" --quantize int$bits "${group[@]}" "${rtn[@]}"
    row "int$bits to nearest, least squares" --quantize int$bits "${group[@]}" --quantizer rtn
    row "int$bits gptq" --quantize int$bits "${group[@]}" "${calibrated[@]}"
    row "int$bits gptq, as published" --quantize int$bits "${group[@]}" "${calibrated[@]}" \
        --damping mean --damp 0.01 --scales minmax --act-order=false
done
for sparsity in 50% 2:4 4:8; do
    prune=(--prune sparsegpt --sparsity $sparsity "${calibrated[@]}")
    row "$sparsity" "${prune[@]}" --format packed
    if [[ "$sparsity, then int4" =~ $filter ]]; then
        rm -rf "$work/pruned"
        "$sparsepack" --quiet convert "$model" -o "$work/pruned" "${prune[@]}" --format packed > /dev/null
        model=$work/pruned row "$sparsity, then int4" --quantize int4 "${g64[@]}" "${calibrated[@]}"
    fi
    row "$sparsity, damping as published" "${prune[@]}" --format packed --damping mean --damp 0.01
    row "$sparsity + int8" "${prune[@]}" --quantize int8 --format packed
    row "$sparsity + int4" "${prune[@]}" --quantize int4 "${g64[@]}"
    row "$sparsity + int8, one sweep" "${prune[@]}" --quantize int8 --format packed --act-order=false
    row "$sparsity + int4, one sweep" "${prune[@]}" --quantize int4 "${g64[@]}" --act-order=false
done
for type in q8_0 q6_k q4_0 q4_k; do
    gguf=(--format gguf --dtype q8_0)
    # What llama-quantize does with the linears; the embeddings are Q8_0 in both.
    row "$type to nearest" "${gguf[@]}" --quantize $type --quantizer rtn
    row "$type solved" "${gguf[@]}" --quantize $type "${calibrated[@]}"
done
