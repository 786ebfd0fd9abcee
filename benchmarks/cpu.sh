#!/usr/bin/env bash
# Everything docs/benchmarks.md shows of a CPU, with two threads, into the folder $OUT. Wants an idle machine and
# about two hours; started again at the same commit, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-bench-results}"
bin="${BIN:-.venv/bin}"
msplora="$bin/msplora"
commit="$("$bin/python" -c 'from msplora.bench.provenance import commit; print(commit())')"
case "$commit" in
  *-dirty)
    echo "The code here is $commit: commit what was changed, or nobody could tell what was measured." >&2
    exit 1
    ;;
esac
roberta="--shape roberta-base --append"
llama="--shape llama-3.2-1b --layers 2 --append"

# One layer by itself: milliseconds, so more rounds.
"$msplora" bench sites --dtype float32 --dtype bfloat16 --rounds 120 --output $out/sites-cpu.json --append

# The main point; then every method at a smaller one.
both="--targets all-linear --targets qv"
"$msplora" bench speed $roberta $both --output $out/speed-cpu.json
every="--method floor --method full --method lora --method lora-again --method lora-equal-rank"
every="$every --method gralora --method vera --method branches --method msplora"
"$msplora" bench speed $roberta --targets all-linear --batch 2 $every --output $out/speed-methods-cpu.json

# Batch and length; depth, at few tokens, where what Python does per layer counts most.
for size in "1 16" "1 128" "8 32" "1 512"; do
  read -r batch length <<< "$size"
  "$msplora" bench speed $roberta $both --batch "$batch" --length "$length" --output $out/speed-cpu.json
done
"$msplora" bench speed $roberta --targets all-linear --batch 1 --length 32 \
  --layers 6 --layers 12 --layers 24 --layers 48 --layers 96 --output $out/speed-cpu.json

# Half precision, with PEFT's float32 adapters, and in autocast; a Llama's layers.
half=$out/speed-bfloat16-cpu.json
"$msplora" bench speed $roberta $both --batch 4 --dtype bfloat16 --dtype bfloat16-autocast --output $half
"$msplora" bench speed $llama $both --batch 1 --dtype float32 --dtype bfloat16 --output $half

# Dropout, gradient checkpointing, compiled.
variants="--targets all-linear --batch 1 --output $out/speed-variants-cpu.json"
"$msplora" bench speed $roberta $variants --dropout 0.05
"$msplora" bench speed $roberta $variants --checkpointing reentrant --checkpointing non-reentrant
"$msplora" bench speed $roberta $variants --layers 4
"$msplora" bench speed $roberta $variants --layers 4 --compile

# Peak memory.
"$msplora" bench memory $roberta $both --dropout 0.0 --dropout 0.05 --dtype float32 --dtype bfloat16 \
  --output $out/memory-cpu.json
"$msplora" bench memory $roberta $both --batch 1 --output $out/memory-cpu.json
"$msplora" bench memory $roberta --targets all-linear --batch 2 $every --output $out/memory-methods-cpu.json

# Planning, injecting, files, singular values.
"$msplora" bench size --output $out/size-cpu.json --append
