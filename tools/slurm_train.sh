#!/usr/bin/env bash
# Trains under Slurm: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS can be set in the environment.
set -euo pipefail
usage='usage: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]'
partition=${1:?$usage} job=${2:?$usage} config=${3:?$usage} work_dir=${4:?$usage}
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2086  # SRUN_ARGS holds several words on purpose
PYTHONPATH="$here/..:${PYTHONPATH:-}" exec srun -p "$partition" --job-name="$job" --gres="gpu:$per_node" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} python -u "$here/train.py" "$config" --work-dir="$work_dir" --launcher=slurm "${@:5}"
