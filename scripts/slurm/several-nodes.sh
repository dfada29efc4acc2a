#!/bin/bash
# Several nodes with one process per GPU:
#     sbatch scripts/slurm/several-nodes.sh model=roberta_large method=sparsegrad task=qqp
# This repository, with work_dir and results_dir, must be on a file system that all nodes share. Three minutes before
# the time limit the run saves a checkpoint and the job is queued again for the same number of nodes; it then resumes.
#SBATCH --job-name=sparsegrad
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
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
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

asked=
stop() { # srun would end the step at once; scancel signals torchrun and its processes on every node
    asked=$1
    scancel --signal=TERM "$SLURM_JOB_ID"
}

srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$gpus" --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:$port" run.py "$@" &
launcher=$!
trap 'stop USR1' USR1
trap 'asked=${asked:-TERM}' TERM # Slurm signals the step itself
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
