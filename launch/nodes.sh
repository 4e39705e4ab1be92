#!/usr/bin/env bash
# Train on several machines without SLURM: run this command on each of them.
#
#   NNODES=2 MASTER_ADDR=node0 launch/nodes.sh CONFIG.yaml [key.path=value ...]
#
#   NNODES=2                 number of machines; 2:4 starts with two to four, as many as join
#   MASTER_ADDR=node0        one of them, by a name or address that all others can reach
#   MASTER_PORT=29400        port of the rendezvous; a second job on the same machines needs another
#   JOB_ID=megatron-moe      name of the job, the same on all of its machines
#   RESTARTS=3               times that torchrun restarts all ranks after one has failed
#   NODE_ADDR=10.0.0.7       address of this machine for the others; default: its name
#   RANKS=8                  ranks on this machine; default: number of visible GPUs, or 1
#   ACTION=bench             command of megatron-moe to run; default: train
#   PYTHON=python3           interpreter that has the package; default: .venv/bin/python of
#                            the repository, or python
#
# run.dir, the data and the source must be on a file system that all machines share. The machines
# must reach each other on all ports, and nobody else should (docs/security.md). Run the same commands
# again to resume from the newest checkpoint.
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
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$RANKS" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${JOB_ID:-megatron-moe}" \
    --max-restarts "${RESTARTS:-3}" ${NODE_ADDR:+--local-addr "$NODE_ADDR"} \
    -m megatron_moe "${ACTION:-train}" "$@"
