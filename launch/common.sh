# shellcheck shell=bash
# Functions of local.sh and nodes.sh: check numbers, find the interpreter, and count ranks.

# Refuse a variable that is set to something else than a whole number in a range. Arguments: name of the
# script, name of the variable, least and greatest number.
check_number() {
    local value=${!2:-$3}
    if [[ ! $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $3 || 10#$value > $4)); then
        echo "$1: $2 ($value) must be a whole number from $3 to $4" >&2
        exit 2
    fi
}

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
