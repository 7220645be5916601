#!/usr/bin/env bash
# Tests on CUDA, then correctness, time and memory of one MoE layer: benchmarks/gpu.sh [DIRECTORY] [options of gpu.py]
#
# DIRECTORY (default: $OUT, else ./gpu-results) receives tests.txt, gpu.json and gpu.md. After tests that fail the rest
# still runs, and the exit code is theirs. Without network it runs in the first Python that has what it needs: $PYTHON,
# the repository's .venv, python3. With --install as first argument it makes .venv-gpu from the pinned constraints first.
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 0
fi
caller=$PWD
cd "$(dirname "$0")/.."

packages=(torch deepspeed megatron.core numpy yaml tqdm)

# Prints what keeps an interpreter from running this, or nothing.
problem() {
  "$1" - "${packages[@]}" 2>/dev/null <<'PYTHON' || echo "does not start"
import importlib.util
import sys

missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name.partition(".")[0]) is None]
if sys.version_info[:2] not in ((3, 11), (3, 12)):
    print(f"is Python {sys.version.split()[0]}, not 3.11 or 3.12")
elif missing:
    print("lacks " + ", ".join(missing))
else:
    import torch

    if not torch.cuda.is_available():
        print(f"has torch {torch.__version__}, which finds no CUDA device")
PYTHON
}

if [[ "${1:-}" == --install ]]; then
  shift
  echo "== making .venv-gpu" >&2
  "${PYTHON:-python3}" -m venv .venv-gpu
  .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
  .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
fi

output=${OUT:-$caller/gpu-results}
if [[ $# -gt 0 && "$1" != -* ]]; then
  output=$1
  shift
fi
[[ "$output" == /* ]] || output=$caller/$output

chosen=""
reasons=""
for candidate in ${PYTHON:+"$PYTHON"} .venv-gpu/bin/python .venv/bin/python python3; do
  command -v "$candidate" >/dev/null || continue
  reason=$(problem "$candidate")
  if [[ -z "$reason" ]]; then
    chosen=$candidate
    break
  fi
  reasons+="; $candidate $reason"
done
if [[ -z "$chosen" ]]; then
  echo "error: no Python here can run this${reasons}; install the requirements of pyproject.toml, name an interpreter" \
    "with PYTHON=, or use --install" >&2
  exit 2
fi

mkdir -p "$output"
echo "== $chosen, results in $output" >&2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
tests=0
if "$chosen" -c 'import pytest' 2>/dev/null; then
  "$chosen" -m pytest -q -p no:cacheprovider -m gpu tests/gpu >"$output/tests.txt" 2>&1 || tests=$?
  echo "== GPU tests: $(tail -n 1 "$output/tests.txt"); $output/tests.txt" >&2
else
  echo "== GPU tests: not run, $chosen has no pytest" >&2
fi
"$chosen" benchmarks/gpu.py "$output" "$@" | tee "$output/gpu.md"
exit "$tests"
