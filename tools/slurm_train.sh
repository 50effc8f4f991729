#!/usr/bin/env bash
# Trains under Slurm: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]
# In the environment: NNODES, GPUS_PER_NODE and with them GPUS, CPUS_PER_TASK, SRUN_ARGS; MASTER_ADDR (the first machine
# of the job if unset) and PORT, which two jobs on one machine must not share. Without a GPU, gloo on the CPU is used.
set -euo pipefail
usage='usage: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]'
partition=${1:?$usage} job=${2:?$usage} config=${3:?$usage} work_dir=${4:?$usage}
per_node=${GPUS_PER_NODE:-8}
gpus=${GPUS:-$((${NNODES:-1} * per_node))}
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2086  # SRUN_ARGS holds several words on purpose
PYTHONPATH="$here/..:${PYTHONPATH:-}" MASTER_PORT="${PORT:-29500}" exec srun -p "$partition" --job-name="$job" \
    ${NNODES:+--nodes="$NNODES"} --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$here/train.py" "$config" --work-dir="$work_dir" --launcher=slurm "${@:5}"
