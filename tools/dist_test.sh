#!/usr/bin/env bash
# Tests on several processes: dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each. Without a GPU, gloo on the CPU is used.
set -euo pipefail
config=${1:?usage: dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]}
checkpoint=${2:?usage: dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]}
gpus=${3:?usage: dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]}
here=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$here/..:${PYTHONPATH:-}" exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$here/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
