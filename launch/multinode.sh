#!/usr/bin/env bash
# Trains on the hosts of a hostfile: deepspeed over pdsh and ssh. Called again it goes on where the run was.
#   bash launch/multinode.sh HOSTFILE CONFIG [--run=DIR] [--section.key=value ...]
#
# HOSTFILE has a line `NAME slots=RANKS` for each host. All hosts need: ssh without a password from here, the virtual
# environment, this folder and the run directory under the same paths. Nothing is installed or copied.
# SIGTERM, SIGUSR1 and Ctrl-C make all ranks save and end, by a file RUN/stop: what deepspeed does itself gives them no
# time, and ends every other launch of this user there too. A second signal does just that.
# Exit status: 0 finished, 2 a mistake or bad data, 75 a rank or a host was lost (restarting helps), 143 saved and
# stopped, 1 a fault in the program.
#
# What travels to the ranks: PATH with the virtual environment first, PYTHONPATH, OMP_NUM_THREADS, DS_ACCELERATOR,
# GLOO_*, NCCL_* (so GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME), MLFLOW_*, the names in TRAVEL="A B", and the lines of
# .deepspeed_env here or in your home. No secret does: all of it stands in the hosts' process lists.
# Environment: VENV (.venv beside launch/), SSH_PORT, MASTER_ADDR (first of `hostname -I` there), MASTER_PORT (29500)
set -euo pipefail
me=launch/multinode.sh
fail() {
    echo "$me: $*" >&2
    exit 2
}
(($# >= 2)) || fail "expected HOSTFILE CONFIG [options]"
hostfile=$1
shift
bin=$(cd "${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}" 2>/dev/null && pwd)/bin || bin=.venv/bin
python=$bin/python
[ -x "$python" ] || fail "$python is not there; run bash launch/setup.sh, or set VENV"
command -v pdsh >/dev/null || fail "pdsh is not there; install it (apt-get install pdsh), or use Slurm or Kubernetes"
run=$("$python" -m mbtrain job check "$@" "--hostfile=$hostfile")
run=${run%%$'\n'*} # --json adds a line

# DeepSpeed writes these into a line for the hosts' shells as they are.
plain='^[][A-Za-z0-9_@%+=:,./ ~-]*$'
for path in "$PWD" "$python"; do
    [[ $path =~ ^[A-Za-z0-9_@+=:,./-]*$ ]] || fail "$path: deepspeed cannot take a folder of that name to other hosts"
done

# It hands on MLFLOW* by itself, on the command line of ssh; what is secret must not be there.
secret='(PASSWORD|TOKEN|SECRET|KEY|CREDENTIALS?)$'
while IFS= read -r name; do
    case $name in MLFLOW* | PYTHON* | MV2* | UCX* | NCCL*) ;; *) continue ;; esac
    if [[ $name =~ $secret ]]; then
        unset "$name"
        echo "$me: $name stays here; a user and password may stand in ~/.mlflow/credentials of the first host" >&2
    elif [[ ${!name} =~ ://[^/]*@ ]]; then
        fail "$name: has a password in it, which every user of the hosts could see; see ~/.mlflow/credentials"
    elif ! [[ ${!name} =~ $plain ]] || [[ ${!name} = *%* ]]; then
        fail "$name: has characters that the hosts' shells would act on; unset it here"
    fi
done < <(compgen -e)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export DS_ENV_FILE=$folder/deepspeed_env # instead of .deepspeed_env; its lines are NAME=VALUE and nothing else
{
    path=$bin
    while IFS= read -r -d: entry; do # of PATH, what needs no quoting
        if [[ $entry =~ ^/[A-Za-z0-9_@+=,./-]+$ && $entry != "$bin" ]]; then path+=:$entry; fi
    done <<<"$PATH:"
    echo "PATH=$path"
    while IFS= read -r name; do
        case $name in
        OMP_NUM_THREADS | DS_ACCELERATOR | GLOO_* | NCCL_*) ;;
        *) [[ " ${TRAVEL:-} " = *" $name "* ]] || continue ;;
        esac
        [[ $name =~ $secret ]] && fail "$name: looks like a secret, which every user of the hosts could see"
        echo "$name=${!name}"
    done < <(compgen -e)
    for file in ~/.deepspeed_env .deepspeed_env; do
        if [ -f "$file" ]; then grep -v -e '^[[:space:]]*$' -e '^[[:space:]]*#' "$file" || true; fi
    done
} >"$DS_ENV_FILE"
while IFS= read -r line; do
    [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= && ${line#*=} =~ $plain && $line != *%* ]] ||
        fail "${line%%=*}: cannot travel to the hosts; expected NAME=VALUE without characters that a shell acts on"
done <"$DS_ENV_FILE"

# An argument passes through DeepSpeed (which puts one with a space into double quotes), pdsh (which reads %), a shell.
quoted() {
    local argument=${1//%/%%}
    case $argument in
    *" "*)
        argument=${argument//\\/\\\\}
        argument=${argument//\$/\\\$}
        printf '%s' "${argument//\`/\\\`}"
        ;;
    *[!A-Za-z0-9_@%+=:,./-]* | "") printf "'%s'" "${argument//\'/\'\\\'\'}" ;;
    *) printf '%s' "$argument" ;;
    esac
}
arguments=()
for argument in "$@"; do arguments+=("$(quoted "$argument")"); done

ssh_options="-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3" # a host that is gone is noticed
export PDSH_SSH_ARGS_APPEND="$ssh_options ${PDSH_SSH_ARGS_APPEND:-}"
deepspeed=("$python" -m deepspeed.launcher.runner "--hostfile=$hostfile" --launcher=pdsh --force_multi --no_local_rank)
deepspeed+=(--log_level=critical "--master_port=${MASTER_PORT:-29500}")
[ -z "${MASTER_ADDR:-}" ] || deepspeed+=("--master_addr=$MASTER_ADDR")
[ -z "${SSH_PORT:-}" ] || deepspeed+=("--ssh_port=$SSH_PORT")

# shellcheck disable=SC2329 # a trap calls it
stop() {
    told=1
    if [ -n "$stopping" ]; then kill -TERM "$launcher"; fi
    stopping=1
}
set -m # the launcher is a process group of its own: Ctrl-C comes here alone
stopping='' told=''
"${deepspeed[@]}" --module mbtrain train --resume "${arguments[@]}" </dev/null &
launcher=$!
trap stop TERM INT USR1 HUP
while :; do
    told=
    code=0
    wait "$launcher" || code=$?
    [ -n "$told" ] || break # else a signal has interrupted the waiting
    mkdir -p "$run"
    while kill -0 "$launcher" 2>/dev/null; do # again and again: a start that is under way removes the file
        : >"$run/stop"
        sleep 2
    done
done
[ -z "$stopping" ] || rm -f "$run/stop"
# deepspeed returns 0 also when a signal ends its pdsh.
if ((code == 0)) && ! grep -qs '"FINISHED"' "$run/status.json"; then code=75; fi
if ((code > 128 && code != 143)); then code=75; fi # a rank killed by a signal, or ssh that failed (255)
exit "$code"
