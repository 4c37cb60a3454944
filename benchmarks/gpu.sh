#!/usr/bin/env bash
# What one GPU is measured with, some eight minutes in all; figures go to RESULTS.md by hand.
#
#   benchmarks/gpu.sh FOLDER [PART...]    each part writes FOLDER/PART.json, its errors beside it
#
# A part that fails or takes too long is named, and the next one runs.
set -u
out="${1:?usage: benchmarks/gpu.sh FOLDER [PART...]}"
shift
wanted=" ${*:-attention attention_4096 shapes_350m shapes_1b offload_350m tiny} "
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit 1
# The default keeps a quarter of the memory back.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.94

part() { # NAME SECONDS COMMAND...
  local name="$1" limit="$2" start=$SECONDS
  shift 2
  case "$wanted" in *" $name "*) ;; *) return ;; esac
  if timeout "$limit" "$@" >"$out/$name.json" 2>"$out/$name.err"; then
    echo "== $name: $((SECONDS - start)) s"
    tail -n 45 "$out/$name.json"
  else
    echo "== $name: FAILED with status $? after $((SECONDS - start)) s"
    tail -n 5 "$out/$name.json"
    grep -a "first step" "$out/$name.err"
    tail -n 12 "$out/$name.err" | cut -c1-600
  fi
}

python3 --version
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
# Dense and STEM side by side need 98 GB with all five tables of the 1B shape.
if [ "$memory" -ge 130000 ]; then layers=1,4,7,10,13; else layers=4; fi
part attention 45 python3 -m benchmarks.attention
part attention_4096 45 python3 -m benchmarks.attention --batch=8 --length=4096 --heads=32 --kv-heads=8
part shapes_350m 110 python3 -m benchmarks.shapes --shape=350m
part shapes_1b 170 python3 -m benchmarks.shapes --shape=1b --stem-layers=$layers --rounds=3
# A quarter of the rows is less than one batch names.
part offload_350m 240 python3 -m benchmarks.offload --shape=350m --resident=0.4 --rounds=2 --steps=4
part tiny 90 python3 -m stem_jax.train --config=configs/tiny.py --workdir="$out/tiny" \
  --config.model.compute_dtype=bfloat16
rm -rf "$out/tiny"
