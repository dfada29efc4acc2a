#!/bin/bash
# A sweep: each task of the array is a worker of one study, with one GPU.
#     sbatch --array=0-31 scripts/slurm/sweep.sh sweep=paper model=roberta_base method=sparsegrad task=cola
# This repository must be on a file system that all nodes share. Set SPARSEGRAD_STORAGE to a database for more than some
# tens of workers. Three minutes before the time limit a worker saves a checkpoint, returns its trial to the study, and
# is queued again.
#SBATCH --job-name=sparsegrad-sweep
#SBATCH --array=0
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -u

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-4}
# A file that works on NFS, where SQLite's locks do not.
export SPARSEGRAD_STORAGE=${SPARSEGRAD_STORAGE:-journal:outputs/studies/studies.log}

asked=
stop() { # TERM: Slurm reclaims the node and, after a pre-emption, queues the task again itself
    if [ -z "$asked" ]; then # a second TERM would stop the worker before it has saved
        asked=$1
        kill -TERM "$worker"
    fi
}

"${PYTHON:-.venv/bin/python}" run.py "$@" &
worker=$!
trap 'stop USR1' USR1
trap 'stop TERM' TERM
wait "$worker"
while kill -0 "$worker" 2>/dev/null; do # each signal interrupts a wait
    wait "$worker"
done
wait "$worker" # for its own status, which is remembered
status=$?
if [ "$asked" = USR1 ]; then
    # The job of one task of an array has the id of the whole array, which would be queued again with all its tasks.
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
fi
exit "$status"
