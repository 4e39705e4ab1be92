#!/usr/bin/env bash
# Train on this machine: one rank a GPU, or CPU ranks where there is none.
#
#   launch/local.sh CONFIG.yaml [key.path=value ...]
#
#   RANKS=4 launch/local.sh CONFIG.yaml       so many ranks; default: the visible GPUs, or 1
#   ACTION=bench launch/local.sh ...          measure instead of training
#   PYTHON=python3 launch/local.sh ...        the interpreter that has the package; default:
#                                             .venv/bin/python of the repository, or python
#
# Run the same command again to resume from the newest checkpoint.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit $(($# == 0 ? 2 : 0))
fi
config=$1
if [[ ! -f $config ]]; then
    echo "launch/local.sh: no such configuration: $config" >&2
    exit 2
fi

# shellcheck source=launch/common.sh
source "$here/common.sh"
find_python "$here"
count_ranks
check_number launch/local.sh RANKS 1 1024
if ((GPUS > 0)); then
    echo "launch/local.sh: $RANKS ranks on $GPUS GPUs" >&2
else
    echo "launch/local.sh: no GPU found, $RANKS ranks on CPU" >&2
fi

# --standalone: a free port is chosen, so that two runs on one machine do not meet.
exec "$PYTHON" "$here/agent.py" --standalone --nproc-per-node "$RANKS" \
    -m megatron_moe "${ACTION:-train}" "$@"
