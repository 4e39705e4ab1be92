#!/usr/bin/env bash
# Train on this machine: one rank a GPU, or CPU ranks where there is none.
#
#   launch/local.sh CONFIG.yaml [key.path=value ...]
#
#   RANKS=4 launch/local.sh CONFIG.yaml       so many ranks; default: the GPUs in sight, or 1
#   ACTION=bench launch/local.sh ...          measure instead of training
#   PYTHON=python3 launch/local.sh ...        the interpreter that has the package; default:
#                                             .venv/bin/python of the repository, or python
#
# Same command again: the run goes on from its newest checkpoint.
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

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    if [[ -x $here/../.venv/bin/python ]]; then PYTHON=$here/../.venv/bin/python; fi
fi

# What the program will see, not what the machine has: CUDA_VISIBLE_DEVICES counts, and -1 hides.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^[[:alnum:]]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

gpus=$(visible_gpus)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
if ((gpus > 0)); then
    echo "launch/local.sh: $ranks ranks on $gpus GPUs" >&2
else
    echo "launch/local.sh: no GPU in sight, $ranks ranks on CPU" >&2
fi

# --standalone: a free port is chosen, so that two runs on one machine do not meet.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    -m megatron_moe "${ACTION:-train}" "$@"
