# shellcheck shell=bash
# Sourced by the batch scripts, in the project's folder. Makes sure that the environment active at submission is the
# right one, and exports what is the same for every rank: where they meet.

fail() {
  echo "$SLURM_JOB_NAME: error: $*" >&2
  exit 2
}

# The ranks start just like that: where this works, what they import is there.
reason=$(python launch/train.py --help 2>&1 >/dev/null) ||
  fail "'python' ($(command -v python || echo not found)) cannot start launch/train.py: $(tail -n 1 <<<"$reason");" \
    "allowed: sbatch called where the environment of mst_ds is active"
unset reason

read -r first_host < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# A node's name need not be one that resolves; its address is what SLURM itself reaches it by.
[[ $(scontrol --oneliner show node "$first_host") =~ \ NodeAddr=([^ ]+) ]] ||
  fail "scontrol shows no address of the node $first_host"
export MASTER_ADDR=${BASH_REMATCH[1]}
# Below the ports that the kernel gives to connections; another for each job that runs on the node.
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
unset first_host

# Since SLURM 22.05 srun does not take this from sbatch's --cpus-per-task.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
