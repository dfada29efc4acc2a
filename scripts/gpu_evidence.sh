#!/usr/bin/env bash
# Make the runs of the evidence blocks (docs/evidence.md) on one GPU, several at a time, within a time limit, and write
# one archive of the new records and searches.
#
#   scripts/gpu_evidence.sh OUT_FOLDER GLUE_FOLDER          # on a machine with CUDA
#   scripts/gpu_evidence.sh OUT_FOLDER GLUE_FOLDER --dry    # lists the cells and makes the archive; runs on a CPU
#
# The script needs the packages of `pip install -e '.[run,sweep]'` and the models in assets/ (`python -m
# sparsegrad.assets minilm mpnet_base`). If the machine has no network and a file of weights is too large to copy at
# once, copy it in pieces: PARTS names a folder with PARTS/minilm/* and PARTS/mpnet_base/*. The pieces are joined in the
# order of their names, and the hash of the result is checked.
#
# Runs that the time limit stops continue from their checkpoints in the next call on the same machine. Finished runs are
# never repeated. On another machine, first unpack the archive over the checkout: it contains the finished runs.
#
# MPS=1 starts NVIDIA's MPS, so that the kernels of all workers run at the same time. Under it, a fault of one process
# ends all others, and on three machines one came within minutes. So a fault stops everything, and the runs are made with
# a new MPS server; a second fault turns MPS off. On an H200 with 16 cores, 20 workers finished 160 trials in 9.5 minutes
# with MPS, and 12 workers 66 shorter ones in 5 minutes without it.
#
# Environment variables: BLOCKS (default "0 1 2a 3 4 5"), TASKS and METHODS (default: those of each plan), WORKERS (runs
# at a time, default 6), MINUTES (the time limit, default 20), MPS (default 0), PYTHON (the interpreter), PARTS.
set -uo pipefail

out=${1:?usage: scripts/gpu_evidence.sh OUT_FOLDER GLUE_FOLDER [--dry]}
data=${2:?usage: scripts/gpu_evidence.sh OUT_FOLDER GLUE_FOLDER [--dry]}
dry=${3:-}
python=${PYTHON:-python3}
blocks=${BLOCKS:-0 1 2a 3 4 5}
workers=${WORKERS:-6}
mps=${MPS:-0}
faults=0
end=$((SECONDS + ${MINUTES:-20} * 60))
mkdir -p "$out" && out=$(cd "$out" && pwd)
data=$(cd "$data" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
touch "$out/start"

join_parts() { # join_parts MODEL: join its pieces to assets/MODEL/model.safetensors and check the hash
  local model=$1
  mkdir -p "assets/$model"
  cat "$PARTS/$model"/* >"assets/$model/model.safetensors" && "$python" -m sparsegrad.assets "$model"
}

if [ -n "${PARTS:-}" ]; then
  for folder in "$PARTS"/*/; do join_parts "$(basename "$folder")" || exit 1; done
fi

"$python" - <<PYTHON_END | tee "$out/versions.txt" || exit 1
import sys, torch, transformers
print(sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)
print("CUDA", torch.version.cuda, [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
sys.exit(0 if torch.cuda.is_available() or "$dry" == "--dry" else "no CUDA device: use --dry for a rehearsal")
PYTHON_END
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 1

start_mps() {
  CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) && export CUDA_MPS_PIPE_DIRECTORY
  export CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  nvidia-cuda-mps-control -d
}

kill_tree() { # kill_tree PID: kill a process and its children
  pkill -KILL -P "$1"
  kill -KILL "$1" 2>/dev/null
}

stop_mps() {
  echo "quit -t 2" | timeout 15 nvidia-cuda-mps-control
  # Where it does not answer after a fault: this daemon and its servers, none of other users.
  if [ -e "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid" ]; then
    kill_tree "$(cat "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid")"
  fi
  rm -rf "$CUDA_MPS_PIPE_DIRECTORY"
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

has_fault() { # whether a log of this call of the block shows a fault of the GPU
  find outputs/work/logs -name '*.log' -newer "$out/began" -exec grep -lE "CUDA error|cudaError|CUBLAS_STATUS" {} + \
    2>/dev/null | grep -q .
}

kill_all() { # kill_all LAUNCHER: end the block and its runs at once: workers with a broken GPU would spoil further trials
  kill -KILL -- "-$1"
  pkill -KILL -f "$PWD/run.py"
  faults=$((faults + 1))
  echo "fault $faults: everything was stopped" | tee -a "$out/summary.txt"
}

make_block() { # make_block BLOCK: make the missing runs of the block within the remaining time
  local launcher status left
  touch "$out/began"
  [ "$mps" = 0 ] || start_mps
  left=$((end - SECONDS))
  [ $left -gt 0 ] || left=1 # 0 would be no limit
  # TERM lets running cells write a checkpoint before they end. `timeout` leads a process group of its own.
  timeout --signal=TERM --kill-after=60 "$left" "$python" -m experiments.reproduce.evidence "$1" \
    ${TASKS:+"task=$TASKS"} ${METHODS:+"method=$METHODS"} --data "$data" --workers "$workers" ${dry:+--dry} \
    > >(tee -a "$out/evidence.log") 2>&1 &
  launcher=$!
  # shellcheck disable=SC2064  # the process of now
  trap "kill -TERM -- -$launcher; wait $launcher; [ $mps = 0 ] || stop_mps; exit 130" INT TERM
  while kill -0 "$launcher" 2>/dev/null; do
    if [ "$mps" != 0 ] && has_fault; then kill_all "$launcher"; fi
    sleep 0.5
  done
  wait "$launcher"
  status=$?
  trap - INT TERM
  [ "$mps" = 0 ] || stop_mps
  [ $faults -lt 2 ] || mps=0
  return $status
}

count_new() { # print the number of records written since the start
  find results/runs -name '*.json' -newer "$out/start" | wc -l
}

status=0
for block in $blocks; do
  # A process that dies on the GPU may end all others: further calls make the missing runs, until two in a row make none.
  for ((idle = 0; idle < 2; )); do
    [ $SECONDS -lt $end ] || break 2
    before=$(count_new) faults_before=$faults
    echo "== block $block, at most $((end - SECONDS)) s"
    make_block "$block"
    status=$?
    echo "block $block: exit status $status, $(($(count_new) - before)) new records" | tee -a "$out/summary.txt"
    [ $faults -eq $faults_before ] || continue
    [ $status -eq 1 ] || break
    if [ "$(count_new)" -gt "$before" ]; then idle=0; else idle=$((idle + 1)); fi
  done
  [ $status -eq 0 ] || break # later blocks need the results of earlier ones
done

# Without the database of searches, which would replace that of the checkout; what is finished is exported beside it.
archive=$out/records-$(date +%Y%m%d-%H%M%S).tar.gz
find results/runs results/studies -type f -newer "$out/start" ! -name '*.lock' ! -name '*.db*' -print0 |
  tar --null --files-from - -czf "$archive"
echo "archive: $archive ($(tar -tzf "$archive" | wc -l) files)"
exit "$status"
