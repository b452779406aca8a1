#!/bin/bash
# One prompt through a model that is spread over the hosts of an Open MPI hostfile.
#
#   MODEL=/shared/MiMo-V2.5-Pro-FP4-DFlash HOSTFILE=hosts MESH=expert=2,tensor=8 \
#       scripts/cluster/openmpi.sh "Once upon a time"
#
# On one machine, without a GPU, two processes of four devices each:
#
#   JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 PROCESSES=2 \
#       MESH=expert=2,tensor=4 scripts/cluster/openmpi.sh "import os"
#
# One process a host, as in slurm.sh. JAX takes the job's shape from Open MPI 4's variables; with
# Open MPI 5 it asks mpi4py, which must be installed besides. MPI itself carries no data.

set -euo pipefail

prompt=${1:?usage: MODEL=FOLDER HOSTFILE=FILE MESH=AXES openmpi.sh PROMPT}
mesh=${MESH:?set MESH, such as expert=2,tensor=8: all devices of all hosts}
gpus=${GPUS_PER_HOST:-8}

if [[ -n ${HOSTFILE:-} ]]; then
    where=(--hostfile "$HOSTFILE" --map-by ppr:1:node)
else
    where=(--host "localhost:${PROCESSES:?set HOSTFILE, or PROCESSES to stay on this machine}")
fi

# JAX would give each process the one GPU of its rank within the host.
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
    export JAX_LOCAL_DEVICE_IDS
fi

# -x hands a variable on to the other hosts; those that are not set are left out.
pass=()
for name in PATH JAX_PLATFORMS JAX_LOCAL_DEVICE_IDS XLA_FLAGS; do
    [[ -z ${!name:-} ]] || pass+=(-x "$name")
done

exec mpirun "${where[@]}" "${pass[@]}" --bind-to none \
    mimo-jax generate --model "${MODEL:-mimo-tiny}" --mesh "$mesh" --distributed --prompt "$prompt"
