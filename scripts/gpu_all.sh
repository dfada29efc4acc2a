#!/usr/bin/env bash
# Run all GPU checks in one call of at most 25 minutes and write one archive: the tests in tests/gpu, the first settings
# of the benchmark, and trials that share the GPU.
#
#   scripts/gpu_all.sh OUT_FOLDER          # on a machine with CUDA; needs the extra `run`, pytest and MiniLM (`make assets`)
#   scripts/gpu_all.sh OUT_FOLDER --dry    # rehearsal on a CPU: the same steps in miniature
#
# Every step has its own time limit. A step that fails does not stop the others; its log is in the archive.
#
# Environment variables: PYTHON (the interpreter), STEPS (default "tests bench packed"), BENCH (arguments of the
# benchmark), MINUTES (its time limit, default 14).
set -uo pipefail

out=${1:?usage: scripts/gpu_all.sh OUT_FOLDER [--dry]}
dry=${2:-}
python=${PYTHON:-python3}
minutes=${MINUTES:-14}
bench=${BENCH:---presets core,model,tokens,precision}
steps=${STEPS:-tests bench packed}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0

step() { # step NAME SECONDS COMMAND...: run with a time limit, keep the log, add the exit status to summary.txt
  local name=$1 limit=$2
  shift 2
  [[ " versions $steps " == *" $name "* ]] || return 0
  echo "== $name (at most $limit s): $*"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  tail -n 5 "$out/$name.log"
  echo "$name: exit status $status" | tee -a "$out/summary.txt"
  [ $status -eq 0 ] || failed=1
}

: >"$out/summary.txt"
step versions 60 "$python" -c "
import sys, torch, transformers
print(sys.version.split()[0], 'torch', torch.__version__, 'transformers', transformers.__version__)
print('CUDA', torch.version.cuda, [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
sys.exit(0 if torch.cuda.is_available() or '$dry' == '--dry' else 'no CUDA device: use --dry for a rehearsal')"
[ $failed -eq 0 ] || exit 1

if [ "$dry" = --dry ]; then
  step tests 300 "$python" -m pytest -q -p no:cacheprovider tests/gpu
  step bench 600 "$python" -m experiments.bench --quick --out "$out/bench.json" --work "$out/work"
  step packed 600 "$python" -m experiments.studies.packed_trials --workers 2 --steps 2 --out "$out/packed_trials.json"
else
  step tests 240 "$python" -m pytest -q -p no:cacheprovider tests/gpu
  # shellcheck disable=SC2086  # $bench is split into its words on purpose
  step bench $((minutes * 60 + 120)) "$python" -m experiments.bench $bench \
    --bases reflections --minutes "$minutes" --out "$out/bench.json" --work "$out/work"
  # Needs Optuna, and nvidia-ml-py for the utilisation of the GPU.
  step packed 240 "$python" -m experiments.studies.packed_trials --device cuda --workers 1 3 6 \
    --out "$out/packed_trials.json"
fi
rm -rf "$out/work"
tar -C "$out" -czf "$out.tar.gz" .
mv "$out.tar.gz" "$out/gpu_all.tar.gz"
echo "archive: $out/gpu_all.tar.gz"
exit $failed
