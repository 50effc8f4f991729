#!/usr/bin/env bash
# What only a GPU can show, in 500 seconds: kernels, whole ViTs and training steps of all stages.
#
#     [PYTHON=python3] benchmarks/run_gpu.sh [--out DIR] [--parts NAME ...] [--dry-run]
#
# Rows go to DIR (benchmarks/results/<name of the GPU>) as they are measured: who is stopped loses none, and the same
# command goes on where it was. Without OpenMMLab's packages, what needs torch and Triton only. --help says more.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -W ignore "$root/benchmarks/run_gpu.py" "$@"
