# shellcheck shell=bash
# Functions of local.sh and nodes.sh: find the interpreter, and count ranks.

# Set PYTHON, unless it is set, to the repository's .venv or the python in PATH.
find_python() {
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python
        if [[ -x $1/../.venv/bin/python ]]; then PYTHON=$1/../.venv/bin/python; fi
    fi
}

# Print the number of GPUs that the program will see, which CUDA_VISIBLE_DEVICES may limit.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^[[:alnum:]]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# Set GPUS, and RANKS unless it is set: one per GPU, or one.
count_ranks() {
    GPUS=$(visible_gpus)
    RANKS=${RANKS:-$((GPUS > 0 ? GPUS : 1))}
}
