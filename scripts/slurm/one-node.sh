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
    if [ -z "$asked" ]; then # a second TERM would stop the run before it has saved
        asked=$1
        kill -TERM "$launcher"
    fi
}

"${PYTHON:-.venv/bin/python}" -m torch.distributed.run --standalone --nproc-per-node="$gpus" run.py "$@" &
launcher=$!
trap 'stop USR1' USR1
trap 'stop TERM' TERM
wait "$launcher"
while kill -0 "$launcher" 2>/dev/null; do # each signal interrupts a wait
    wait "$launcher"
done
wait "$launcher" # for its own status, which is remembered
status=$?
if [ "$asked" = USR1 ]; then
    # The job of one task of an array has the id of the whole array, which would be queued again with all its tasks.
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
fi
exit "$status"
