#!/usr/bin/env bash
# Makes the environment of the peer that `mbtrain bench` measures against: MEGABYTE-pytorch 0.3.6 on the torch that
# mbtrain itself uses. It is a virtual environment of its own: mbtrain never imports it nor depends on it.
#
#   PEER=$(bash launch/peer.sh | tail -n 1)         once: a minute or two, about 1 GB; afterwards a second
#   mbtrain bench train --peer="$PEER" --json
#
# Usage: launch/peer.sh [DIR=.cache/peer]           PYTHON names another interpreter than python3.11
set -euo pipefail

dir=${1:-.cache/peer}
torch=2.13.0
peer=0.3.6
wanted="torch $torch MEGABYTE-pytorch $peer"

# The marker is written last: an installation that was interrupted is made anew.
if [[ ! -x $dir/bin/python || $(cat "$dir/installed" 2>/dev/null) != "$wanted" ]]; then
  "${PYTHON:-python3.11}" -m venv --clear "$dir"
  # numpy is no dependency of the peer, but torch warns at every start where it is missing.
  "$dir/bin/python" -m pip install --quiet "torch==$torch" "MEGABYTE-pytorch==$peer" numpy >&2
  "$dir/bin/python" -c 'import MEGABYTE_pytorch' >&2
  printf '%s\n' "$wanted" >"$dir/installed"
fi

printf '%s\n' "$(cd "$dir" && pwd)/bin/python"
