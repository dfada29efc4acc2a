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
# Leave NVIDIA's MPS off: under it, a fault of one process ended all others within minutes, on two machines. Without
# it, WORKERS=12 finished 66 trials in 5 minutes on an H200 with 16 cores.
#
# Environment variables: BLOCKS (default "0 1 2a 3 4 5"), TASKS (default: those of each plan), WORKERS (runs at a time,
# default 6), MINUTES (the time limit, default 20), PYTHON (the interpreter), PARTS.
set -uo pipefail

out=${1:?usage: scripts/gpu_evidence.sh OUT_FOLDER GLUE_FOLDER [--dry]}
data=${2:?usage: scripts/gpu_evidence.sh OUT_FOLDER GLUE_FOLDER [--dry]}
dry=${3:-}
python=${PYTHON:-python3}
blocks=${BLOCKS:-0 1 2a 3 4 5}
workers=${WORKERS:-6}
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

module_of() { # module_of BLOCK: print the module that makes the block, and its arguments. Block 1 is the searches
  if [ "$1" = 1 ] && [ -n "${TASKS:-}" ]; then
    echo "experiments.reproduce.search_all --scale mini --tasks $TASKS"
  else
    echo "experiments.reproduce.evidence $1 ${TASKS:+task=$TASKS}"
  fi
}

make_block() { # make_block BLOCK: make the missing runs of the block within the remaining time
  # TERM lets running cells write a checkpoint before they end.
  # shellcheck disable=SC2046  # the output of module_of is split into words on purpose
  timeout --signal=TERM --kill-after=60 "$((end - SECONDS))" "$python" -m $(module_of "$1") --data "$data" \
    --workers "$workers" ${dry:+--dry} 2>&1 | tee -a "$out/evidence.log"
  return "${PIPESTATUS[0]}"
}

count_new() { # print the number of records written since the start
  find results/runs -name '*.json' -newer "$out/start" | wc -l
}

status=0
for block in $blocks; do
  # A process that dies on the GPU may end all others: further calls make the missing runs, until two in a row make none.
  for ((idle = 0; idle < 2; )); do
    [ $SECONDS -lt $end ] || break 2
    before=$(count_new)
    echo "== block $block, at most $((end - SECONDS)) s"
    make_block "$block"
    status=$?
    echo "block $block: exit status $status, $(($(count_new) - before)) new records" | tee -a "$out/summary.txt"
    [ $status -eq 1 ] || break
    if [ "$(count_new)" -gt "$before" ]; then idle=0; else idle=$((idle + 1)); fi
  done
  [ $status -eq 0 ] || break # later blocks need the results of earlier ones
done

find results/runs results/studies -type f -newer "$out/start" ! -name '*.lock' -print0 |
  tar --null --files-from - -czf "$out/records.tar.gz"
echo "archive: $out/records.tar.gz ($(tar -tzf "$out/records.tar.gz" | wc -l) files)"
exit "$status"
