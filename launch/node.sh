#!/usr/bin/env bash
# Trains on one machine under deepspeed, with a rank on each GPU; and goes on where the run was when called again.
#   bash launch/node.sh CONFIG [--run=DIR] [--section.key=value ...]
#   RANKS=2 bash launch/node.sh configs/quickstart.yaml           on a CPU (default there: 1 rank with all cores)
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node-a bash launch/node.sh CONFIG      and NODE_RANK=1 on the other machine, no ssh
#
# SIGTERM, SIGUSR1 and Ctrl-C are handed to the ranks, which save and end; the deepspeed command alone would die of
# SIGTERM and leave its ranks behind. Exit status: 0 finished, 2 a mistake or bad data, 75 a rank was lost (restarting
# helps), 143 saved and stopped, 1 a fault in the program.
#
# Environment: VENV (.venv beside launch/); RANKS on this machine, the same on all; RETRIES (0): after a loss it is
# started again here, until so many in a row brought no new checkpoint; PAUSE (15) seconds before that;
# NODES (1), NODE_RANK (0), MASTER_ADDR, MASTER_PORT (29500; alone: a free one): a PyTorchJob sets them as PET_NNODES
# and so on. CUDA_VISIBLE_DEVICES counts where RANKS is not given.
set -euo pipefail
bin=$(cd "${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}" 2>/dev/null && pwd)/bin || bin=.venv/bin
python=$bin/python
[ -x "$python" ] || {
    echo "launch/node.sh: $python is not there; run bash launch/setup.sh, or set VENV" >&2
    exit 2
}
export PATH=$bin:$PATH
nodes=${NODES:-${PET_NNODES:-1}}
node=${NODE_RANK:-${PET_NODE_RANK:-0}}
unset RANK WORLD_SIZE # a PyTorchJob counts pods with them; here deepspeed sets them for each rank

# deepspeed's own command adds nothing on one machine, and returns 0 when a signal ends the launcher below it.
read -r ranks world free_port < <("$python" - "$nodes" "${RANKS:-0}" <<'PYTHON'
import base64, json, os, socket, sys, torch
nodes, ranks = int(sys.argv[1]), int(sys.argv[2])
gpus = torch.cuda.device_count()
ranks = ranks or gpus or 1
visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
slots = visible[:ranks] if len(visible) >= ranks else list(range(ranks))
world = base64.urlsafe_b64encode(json.dumps({f"node{i}": slots for i in range(nodes)}).encode()).decode()
probe = socket.create_server(("127.0.0.1", 0))
print(ranks if gpus else -ranks, world, probe.getsockname()[1])
PYTHON
)
if ((ranks < 0)); then
    ranks=${ranks#-}
    export DS_ACCELERATOR=cpu
fi
run=$("$python" -m mbtrain job check "$@" "--nodes=$nodes" "--ranks=$ranks")
run=${run%%$'\n'*} # --json adds a line
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

if [ "$nodes" = 1 ]; then
    address=127.0.0.1 port=${MASTER_PORT:-$free_port}
else
    address=${MASTER_ADDR:?is the name or address of the machine with NODE_RANK=0} port=${MASTER_PORT:-29500}
fi
deepspeed=("$python" -u -m deepspeed.launcher.launch "--world_info=$world" "--node_rank=$node" --log_level=critical)
deepspeed+=("--master_addr=$address" "--master_port=$port" --no_local_rank --module)

newest_checkpoint() {
    local all=("$run"/checkpoints/step_*)
    echo "${all[-1]}"
}

# The launcher itself would end of SIGTERM with status 1. Its ranks may not have been started yet.
# shellcheck disable=SC2329 # a trap calls it
tell_ranks() {
    told=1 stopping=1
    [ -n "$launcher" ] || return 0
    "$python" - "$launcher" <<'PYTHON' || true
import sys, time, psutil
try:
    launcher = psutil.Process(int(sys.argv[1]))
    while not (ranks := launcher.children()) and launcher.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.2)
    for rank in ranks:
        rank.terminate()
except psutil.NoSuchProcess:
    pass
PYTHON
}

# Runs the launcher to its end and sets `code` to one of the exit statuses above.
attempt() {
    "${deepspeed[@]}" mbtrain train --resume "$@" </dev/null &
    launcher=$!
    while :; do
        told=
        code=0
        wait "$launcher" || code=$?
        [ -n "$told" ] || break # else a signal has interrupted the waiting
    done
    launcher=
    if ((code == 241)) && [ -n "$stopping" ]; then # ended by SIGTERM before there was anything to save
        code=143
    elif ((code > 128 && code != 143)); then # a signal that nobody sent on purpose; 256 - signal from Python
        code=75
    fi
}

set -m # the launcher is a process group of its own: Ctrl-C comes here alone
launcher='' stopping='' told=''
trap tell_ranks TERM INT USR1
failures=0
while :; do
    before=$(newest_checkpoint)
    attempt "$@"
    [ "$code" = 75 ] && [ -z "$stopping" ] || break
    if [ "$(newest_checkpoint)" = "$before" ]; then failures=$((failures + 1)); else failures=1; fi
    if ((failures > ${RETRIES:-0})); then break; fi
    echo "launch/node.sh: exit status $code; starting again in ${PAUSE:-15} s ($failures of ${RETRIES:-0})" >&2
    sleep "${PAUSE:-15}" &
    wait $! || {
        code=143
        break
    }
done
exit "$code"
