#!/usr/bin/env bash
# From a fresh clone to a trained model and a sample: set-up, data, training (by deepspeed on GPUs), MLflow, summary.
#   bash launch/quickstart.sh [--minutes=4] [--any.override=value ...]
# Called again it goes on from what is there: a larger --minutes trains further.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
PATH=$PWD/${VENV:-.venv}/bin:$PATH

minutes=()
for arg in "$@"; do
    shift
    case $arg in
    --minutes=*) minutes=("--train.minutes=${arg#*=}") ;;
    *) set -- "$@" "$arg" ;;
    esac
done

# Real text that is present everywhere: the sources of the interpreter's own standard library.
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
mbtrain-prep text "$stdlib" --out=shards/stdlib --glob='*.py' --exclude=site-packages,dist-packages \
    --splits=train=0.96,val=0.02,test=0.02

# One rank a GPU; on CPU one with all cores, which is faster than one a core (docs/performance.md) and needs no launcher.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
train=(mbtrain train configs/quickstart.yaml --run=runs/quickstart --resume "${minutes[@]}" "$@")
if [ "$gpus" = 0 ]; then
    "${train[@]}"
else
    deepspeed --num_gpus="$gpus" --log_level=error --module "${train[@]}"
fi

mbtrain summary runs/quickstart --prompt='def '
