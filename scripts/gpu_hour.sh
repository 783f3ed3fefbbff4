#!/usr/bin/env bash
# The first hour on a GPU, in steps that each write what they measured after every row:
#   bash scripts/gpu_hour.sh check OUT     are engine and kernels right here? all at once: nothing is timed (minutes: they compile)
#   bash scripts/gpu_hour.sh kernels OUT   decode attention, packing and column sums at Llama's shapes, beside copy and SDPA
#   bash scripts/gpu_hour.sh engine OUT    a Llama-2-7B of random weights, beside transformers
#   bash scripts/gpu_hour.sh choices OUT   the same kernels with other numbers of registers, programs, scales at once
# Needs torch, triton and transformers; neither hydra nor a network. PYTHON=... chooses the interpreter.
set -u
cd "$(dirname "$0")/.."
step=${1:?check, kernels, engine or choices} out=${2:?a folder for JSON and logs} python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
bench() { "$python" scripts/bench_kernels.py "$@"; }
case $step in
check)
  pids=() names=()
  at_once() { local name=$1; shift; "$@" > "$out/$name.log" 2>&1 & pids+=($!); names+=("$name"); }
  for type in float16 bfloat16; do
    at_once "check-$type" "$python" scripts/check_gpu.py --types $type --json "$out/check-$type.json"
  done
  for model in Llama-2-7B Llama-3-8B SmolLM2-135M; do at_once "kernels-$model" bench --models $model --only ""; done
  status=0
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}" || { status=1; echo "${names[$i]}: failed"; }
    tail -n 30 "$out/${names[$i]}.log"
  done
  exit $status ;;
kernels)
  bench --models Llama-2-7B,Llama-3-8B --batches 1,8 --tokens 4096,32768 --only decode,prefill --json "$out/kernels.json" ;;
engine)
  bench --models Llama-3-8B --only "end to end" --json "$out/engine.json" ;;
choices)
  bench --models Llama-2-7B --batches 8 --tokens 16384 --caches "8;4;3;2;trellis 2" --only choices --json "$out/choices.json" ;;
*) echo "unknown step $step" >&2; exit 2 ;;
esac
