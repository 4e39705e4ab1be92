#!/usr/bin/env bash
# Start a command in the container as the owner of the folder it starts in, so that a run can write
# there and its files belong to whoever mounted it. A user set from outside (--user, Pyxis, the
# security context of a pod) stays, and so does root where the folder is root's.
set -euo pipefail

command=("$@")
# The base image's own entrypoint looks at the driver and says what does not fit.
base=/opt/nvidia/nvidia_entrypoint.sh
if [[ -x $base ]]; then command=("$base" "$@"); fi

become=(setpriv --reuid "$(stat --format %u .)" --regid "$(stat --format %g .)" --clear-groups)
# In a user namespace the owner may have no id in here, which root cannot take then.
if ((EUID == 0)) && "${become[@]}" true 2>/dev/null; then command=("${become[@]}" "${command[@]}"); fi
exec "${command[@]}"
