#!/usr/bin/env bash
# Train on several machines without SLURM: run this command on each of them.
#
#   NNODES=2 MASTER_ADDR=node0 launch/nodes.sh CONFIG.yaml [key.path=value ...]
#
#   NNODES=2                 number of machines; 2:4 trains on two to four of them: see below
#   MASTER_ADDR=node0        one of them, by a name or address that all others can reach
#   MASTER_PORT=29400        port of the rendezvous; a second job on the same machines needs another
#   JOB_ID=megatron-moe      name of the job, the same on all of its machines
#   RESTARTS=3               times that torchrun restarts all ranks after one has failed
#   LAST_CALL=30             with NNODES=2:4, seconds to wait for more machines than the smallest
#                            number, at every start and restart
#   NODE_ADDR=10.0.0.7       address of this machine for the others; default: its name
#   RANKS=8                  ranks on this machine; default: number of visible GPUs, or 1
#   ACTION=bench             command of megatron-moe to run; default: train
#   PYTHON=python3           interpreter that has the package; default: .venv/bin/python of
#                            the repository, or python
#
# run.dir, the data and the source must be on a file system that all machines share. The machines
# must reach each other on all ports, and nobody else should (docs/security.md). Run the same commands
# again to resume from the newest checkpoint.
#
# With NNODES=2:4, set parallel.adapt_to_ranks=true, unless the layout is legal for each number. If a
# machine is lost or stopped, the others resume without it; run the command on it again, and all
# restart with it. If MASTER_ADDR is lost, all end: run the command on each with another MASTER_ADDR.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit $(($# == 0 ? 2 : 0))
fi
if [[ -z ${NNODES:-} || -z ${MASTER_ADDR:-} ]]; then
    echo "launch/nodes.sh: set NNODES (number of machines) and MASTER_ADDR (one of them)" >&2
    exit 2
fi
if [[ ! -f $1 ]]; then
    echo "launch/nodes.sh: no such configuration: $1" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$here/common.sh"
find_python "$here"
count_ranks
if [[ ! $NNODES =~ ^[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?$ ]] || ((${NNODES%:*} > ${NNODES#*:})); then
    echo "launch/nodes.sh: NNODES ($NNODES) must be a number of machines, as 2, or the smallest and" \
        "the largest one, as 2:4" >&2
    exit 2
fi
check_number launch/nodes.sh RANKS 1 1024
check_number launch/nodes.sh RESTARTS 0 1000000
check_number launch/nodes.sh MASTER_PORT 1 65535
check_number launch/nodes.sh LAST_CALL 0 1000000

# Exit status 0 if MASTER_ADDR is this machine, 1 if it is another, 2 if nobody knows it, 3 if this
# machine does not know its own name, which torchrun looks up.
own_address='
import socket, sys
try:
    socket.getaddrinfo(socket.gethostname(), None)
except OSError:
    sys.exit(3)
try:
    entries = socket.getaddrinfo(sys.argv[1], 0, type=socket.SOCK_DGRAM)
except OSError:
    sys.exit(2)
for family, kind, protocol, _, address in entries:
    try:
        socket.socket(family, kind, protocol).bind(address)
        sys.exit(0)
    except OSError:
        pass
sys.exit(1)
'
port=${MASTER_PORT:-29400}
endpoint=$MASTER_ADDR:$port
status=0
"$PYTHON" -c "$own_address" "$MASTER_ADDR" || status=$?
if ((status == 2)); then
    echo "launch/nodes.sh: MASTER_ADDR ($MASTER_ADDR) cannot be resolved on $(hostname)" >&2
    exit 2
elif ((status == 3)); then
    echo "launch/nodes.sh: $(hostname), the name of this machine, cannot be resolved on it;" \
        "add it to /etc/hosts" >&2
    exit 2
elif ((status == 0)); then
    # torchrun knows its machine by name only; localhost makes it keep the rendezvous, for all.
    endpoint=localhost:$port
fi
echo "launch/nodes.sh: $RANKS ranks here, on one of $NNODES machines that meet at" \
    "$MASTER_ADDR:$port" >&2

# c10d: one of the machines keeps the rendezvous, so nothing else needs to run. torchrun tells the
# ranks which machine has rank 0, which may be another one, so ours must not reach them.
unset MASTER_ADDR MASTER_PORT

# By default, torchrun's agent on the machine of rank 0 serves one store for all restarts. If that
# machine is lost, or one that returns becomes the first, the others still have the old address, and
# ranks wait for hours. With this variable, rank 0 serves a new store after each restart.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# When a store ends, torch's C++ code prints stack traces as warnings, also at the end of a good job.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

# torchrun takes exit status 0 for the end of the job, but here ranks that a signal has stopped are
# to be started again, on the machines that are left (megatron_moe/runtime/launchers.py).
if [[ $NNODES == *:* ]]; then export MEGATRON_MOE_ELASTIC=1; fi

exec "$PYTHON" "$here/agent.py" --nnodes "$NNODES" --nproc-per-node "$RANKS" \
    --rdzv-backend c10d_limited --rdzv-endpoint "$endpoint" --rdzv-id "${JOB_ID:-megatron-moe}" \
    --rdzv-conf "last_call_timeout=${LAST_CALL:-30}" \
    --max-restarts "${RESTARTS:-3}" ${NODE_ADDR:+--local-addr "$NODE_ADDR"} \
    -m megatron_moe "${ACTION:-train}" "$@"
