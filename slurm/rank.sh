#!/usr/bin/env bash
# One task of srun becomes one rank: srun slurm/rank.sh python launch/train.py ...
# MASTER_ADDR and MASTER_PORT come from slurm/setup.sh.
set -euo pipefail

# Tasks of each node: 8, or 8(x4) for four such nodes. The mesh needs nodes that are alike.
if ! [[ $SLURM_STEP_TASKS_PER_NODE =~ ^([0-9]+)(\(x[0-9]+\))?$ ]]; then
  echo "rank.sh: error: tasks per node are $SLURM_STEP_TASKS_PER_NODE; allowed: as many on each (--ntasks-per-node)" >&2
  exit 2
fi
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${BASH_REMATCH[1]}
# By its own name DeepSpeed sees that all ranks are on one node, and takes its faster collective on CPUs.
export LOCAL_SIZE=$LOCAL_WORLD_SIZE
# Ranks that share a sequence have numbers next to each other, and belong on one node.
if ((RANK != SLURM_NODEID * LOCAL_WORLD_SIZE + LOCAL_RANK)); then
  echo "rank.sh: error: task $RANK is number $LOCAL_RANK on node number $SLURM_NODEID; allowed: tasks that fill one" \
    "node after another (--distribution=block)" >&2
  exit 2
fi
# A rank takes the GPU of its number on the node. SLURM names those that it sees, where it hands out GPUs.
gpus=${CUDA_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}}
IFS=, read -ra seen <<<"$gpus"
if [[ $gpus =~ ^([0-9]|GPU|MIG) && ${#seen[@]} -lt $LOCAL_WORLD_SIZE ]]; then
  echo "rank.sh: error: task $RANK sees the GPUs '$gpus', and its node has $LOCAL_WORLD_SIZE ranks; allowed: all of the" \
    "node's GPUs for each (--gpus-per-node=$LOCAL_WORLD_SIZE, without --gpus-per-task and --gpu-bind)" >&2
  exit 2
fi
# Its part of the cores that the job has on this node, also for an optimizer on the CPU.
threads=$((${SLURM_CPUS_ON_NODE:-1} / LOCAL_WORLD_SIZE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# Where a log is appended to, also where this start begins.
echo "rank $RANK of $WORLD_SIZE on $SLURMD_NODENAME" >&2
exec "$@"
