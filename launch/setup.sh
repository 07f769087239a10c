#!/usr/bin/env bash
# Makes .venv with everything pinned, or does nothing when it is up to date. Needs Python 3.11 or newer, and a compiler.
#   bash launch/setup.sh            CPU or CUDA: the same pins
# Environment: PYTHON (python3), VENV (.venv)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "launch/setup.sh: needs Python 3.11 or newer, found $("$python" --version); set PYTHON=..." >&2
    exit 2
}
stamp=$venv/installed-from
wanted=$(cat pyproject.toml launch/constraints.txt launch/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
echo "installing into $venv (a minute or two) ..." >&2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# DeepSpeed comes as source and builds no kernels here; its set-up wants these two beside it.
"$venv/bin/pip" install -qq --disable-pip-version-check -c launch/constraints.txt setuptools wheel
"$venv/bin/pip" install -qq --disable-pip-version-check -c launch/constraints.txt -e '.[dev]'
echo "$wanted" >"$stamp"
