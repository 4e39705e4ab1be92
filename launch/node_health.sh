#!/usr/bin/env bash
# Check that this node can run a job; otherwise print what is wrong with it, and fail.
#
#   launch/node_health.sh GPUS FOLDER     GPUS must respond, and FOLDER must be writable
set -euo pipefail

gpus=${1:?number of GPUs} folder=${2:?folder}
node=$(hostname)
failed=0
complain() {
    echo "node_health: $node: $1" >&2
    failed=1
}

if ((gpus > 0)); then
    # nvidia-smi hangs if a GPU has fallen off the bus, so it has a minute.
    if ! uncorrected=$(timeout 60 nvidia-smi --format=csv,noheader \
        --query-gpu=ecc.errors.uncorrected.volatile.total); then
        complain "nvidia-smi fails or does not respond: reboot the node, or exclude it"
    else
        responding=$(grep -c . <<<"$uncorrected" || true)
        ((responding >= gpus)) || complain "$responding of $gpus GPUs respond"
        # A GPU without this counter prints [N/A].
        if grep -qE '^[1-9]' <<<"$uncorrected"; then
            complain "a GPU has uncorrected memory errors: $(tr '\n' ' ' <<<"$uncorrected")"
        fi
    fi
fi

if probe=$(mktemp "$folder/.node_health.XXXXXX" 2>/dev/null); then
    rm -f "$probe"
else
    complain "cannot write to $folder: check that the shared file system is mounted and has free space"
fi

exit "$failed"
