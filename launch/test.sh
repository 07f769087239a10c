#!/usr/bin/env bash
# Installs what is needed and runs the tests: on a fresh machine, in CI and while working.
#   bash launch/test.sh                    everything but the slow trials
#   bash launch/test.sh -m slow            the slow trials
#   bash launch/test.sh tests/model -k causal
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
export OMP_NUM_THREADS=1
# Tests wait for processes more than they compute, so a few more workers than cores.
workers=${WORKERS:-$(($(nproc) + 1))}
case " $* " in *" -m "*) ;; *) set -- -m "not slow" "$@" ;; esac
exec "${VENV:-.venv}/bin/python" -m pytest -n "$workers" --dist worksteal "$@"
