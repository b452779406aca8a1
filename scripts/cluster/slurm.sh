#!/bin/bash
# One prompt through a model that is spread over two nodes of eight GPUs.
#
#   MODEL=/shared/MiMo-V2.5-Pro-FP4-DFlash sbatch scripts/cluster/slurm.sh "Once upon a time"
#
# One process a node: the eight GPUs of a node then share one compiled program, one tokenizer and
# the pages of the files that are read, and the job has two processes to start and to lose, not 16.
# JAX takes the job's shape from Slurm's variables (jax.distributed), which srun sets.
#
#SBATCH --job-name=mimo-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --output=mimo-jax-%j.out

set -euo pipefail

prompt=${1:?usage: MODEL=FOLDER sbatch slurm.sh PROMPT}
model=${MODEL:?set MODEL to the checkpoint, in a folder that every node sees}

# JAX would give each process the one GPU of its rank within the node.
export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7

# The tensor axis is the inner one, eight GPUs on NVLink.  Under the rules "latency" a layer's two
# all-reduces go over both axes, and so cross the nodes.
# Only process 0 writes to stdout; each process has its own file for what goes wrong. When one dies
# srun kills the others at once; without this option they notice it themselves, within a minute.
srun --kill-on-bad-exit=1 --error="mimo-jax-%j.%t.err" \
    mimo-jax generate --model "$model" --mesh "${MESH:-expert=2,tensor=8}" --distributed \
    --prompt "$prompt"
