#!/usr/bin/env bash
# Blocks of the evidence on one GPU: several runs at a time, a time limit, one archive of records and searches.
#
#   scripts/gpu_evidence.sh OUT_FOLDER GLUE_FOLDER          # on a machine with CUDA
#   scripts/gpu_evidence.sh OUT_FOLDER GLUE_FOLDER --dry    # lists the cells and makes the archive; runs on a CPU
#
# Needs the packages of `pip install -e '.[run,sweep]'` and the models in assets/ (`python -m sparsegrad.assets minilm
# mpnet_base`). Where there is no network and one copy is too large, send a model's weights in pieces: PARTS names the
# folder that has PARTS/minilm/*, PARTS/mpnet_base/*, in the order of their names. They are joined and their hash checked.
#
# Runs that the limit stops continue from their checkpoint in the next call on the same machine, and finished ones are
# never repeated. On another machine, unpack the archive over the checkout first: it holds what was finished.
#
# BLOCKS (default "0 1 2a 3 4 5"), TASKS (default: those of each plan), WORKERS (default 6), MINUTES (default 20) and
# PYTHON can be set.
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

join_parts() { # join_parts MODEL: its pieces become assets/MODEL/model.safetensors
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

module_of() { # module_of BLOCK: the module that makes it and its arguments; block 1 is the searches
  if [ "$1" = 1 ] && [ -n "${TASKS:-}" ]; then
    echo "experiments.reproduce.search_all --scale mini --tasks $TASKS"
  else
    echo "experiments.reproduce.evidence $1 ${TASKS:+task=$TASKS}"
  fi
}

make_block() { # make_block BLOCK: one call of it within the time left
  # TERM lets the running cells write a checkpoint.
  # shellcheck disable=SC2046  # several words are meant
  timeout --signal=TERM --kill-after=60 "$((end - SECONDS))" "$python" -m $(module_of "$1") --data "$data" \
    --workers "$workers" ${dry:+--dry} 2>&1 | tee -a "$out/evidence.log"
  return "${PIPESTATUS[0]}"
}

status=0
for block in $blocks; do
  for attempt in 1 2 3; do # a process that dies on the GPU may take others with it: what they lack is made again
    [ $SECONDS -lt $end ] || break 2
    echo "== block $block, call $attempt, at most $((end - SECONDS)) s"
    make_block "$block"
    status=$?
    echo "block $block: exit status $status" | tee -a "$out/summary.txt"
    [ $status -eq 1 ] || break
  done
  [ $status -eq 0 ] || break # blocks build on each other
done

find results/runs results/studies -type f -newer "$out/start" ! -name '*.lock' -print0 |
  tar --null --files-from - -czf "$out/records.tar.gz"
echo "archive: $out/records.tar.gz ($(tar -tzf "$out/records.tar.gz" | wc -l) files)"
exit "$status"
