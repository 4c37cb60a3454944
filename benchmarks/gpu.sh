#!/usr/bin/env bash
# What one GPU is measured with: see benchmarks/gpu.py.
#
#   benchmarks/gpu.sh FOLDER [--only=ITEM,...] [--dry-run]
set -eu
folder="${1:?usage: benchmarks/gpu.sh FOLDER [--only=ITEM,...] [--dry-run]}"
shift
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
cd "$(dirname "$0")/.."
python3 --version
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
fi
# The default keeps a quarter of the memory back.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}"
exec python3 -m benchmarks.gpu "$folder" "$@"
