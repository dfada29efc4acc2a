#!/bin/bash
# One node, a process for each of its GPUs:
#     sbatch scripts/slurm/one-node.sh model=roberta_base method=sparsegrad task=cola
# Three minutes before the time is up the run saves and the job is queued again; the same command then goes on.
#SBATCH --job-name=sparsegrad
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -u

gpus=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=$(((${SLURM_CPUS_PER_TASK:-gpus} + gpus - 1) / gpus))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 # seconds for the last checkpoint, before torchrun kills

asked=
stop() { # TERM: Slurm takes the node, and queues the job again itself if it was pre-empted
    asked=$1
    kill -TERM "$launcher"
}

"${PYTHON:-.venv/bin/python}" -m torch.distributed.run --standalone --nproc-per-node="$gpus" run.py "$@" &
launcher=$!
trap 'stop USR1' USR1
trap 'stop TERM' TERM
wait "$launcher"
status=$?
if [ -n "$asked" ]; then # that wait ended with the signal
    wait "$launcher"
    status=$?
fi
if [ "$asked" = USR1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
