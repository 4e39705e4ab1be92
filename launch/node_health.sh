#!/usr/bin/env bash
# Is this node fit to run? Says what is wrong, by the node's name, and fails.
#
#   launch/node_health.sh GPUS FOLDER     so many GPUs must answer, FOLDER must take a file
set -euo pipefail

gpus=${1:?how many GPUs} folder=${2:?which folder}
node=$(hostname)
sick=0
complain() {
    echo "node_health: $node: $1" >&2
    sick=1
}

if ((gpus > 0)); then
    # A GPU that fell off the bus hangs the tool that asks for it, so it gets a minute.
    if ! uncorrected=$(timeout 60 nvidia-smi --format=csv,noheader \
        --query-gpu=ecc.errors.uncorrected.volatile.total); then
        complain "nvidia-smi fails or does not answer: reboot the node, or exclude it"
    else
        found=$(grep -c . <<<"$uncorrected" || true)
        ((found >= gpus)) || complain "$found of $gpus GPUs answer"
        # Where a GPU counts none it says [N/A].
        if grep -qE '^[1-9]' <<<"$uncorrected"; then
            complain "a GPU has uncorrected memory errors: $(tr '\n' ' ' <<<"$uncorrected")"
        fi
    fi
fi

if probe=$(mktemp "$folder/.node_health.XXXXXX" 2>/dev/null); then
    rm -f "$probe"
else
    complain "cannot write to $folder: is the shared file system mounted, and is there room?"
fi

exit "$sick"
