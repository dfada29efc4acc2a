#!/bin/bash
# One node with one process per GPU:
#     sbatch scripts/slurm/one-node.sh model=roberta_base method=sparsegrad task=cola
# Three minutes before the time limit the run saves a checkpoint and the job is queued again; it then resumes.
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
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 # seconds for the last checkpoint before torchrun kills the processes

asked=
stop() { # TERM: Slurm reclaims the node and, after a pre-emption, queues the job again itself
    asked=$1
    kill -TERM "$launcher"
}

"${PYTHON:-.venv/bin/python}" -m torch.distributed.run --standalone --nproc-per-node="$gpus" run.py "$@" &
launcher=$!
trap 'stop USR1' USR1
trap 'stop TERM' TERM
wait "$launcher"
status=$?
if [ -n "$asked" ]; then # the first wait was interrupted by the signal
    wait "$launcher"
    status=$?
fi
if [ "$asked" = USR1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
