#!/usr/bin/env bash
# Starts a SLURM cluster of two nodes, n1 and n2, on this one machine: slurm/local/start.sh [folder]
# For tests, and to try the scripts of slurm/ before a real cluster gets them. Everything it makes lies in `folder`
# (default: /tmp/mst_ds-slurm); stop.sh ends and removes it. Needs neither systemd nor cgroups; the clusters of several
# folders run side by side.
set -euo pipefail

readonly WAIT_SECONDS=60 CPUS_PER_NODE=2
folder=$(realpath -m "${1:-/tmp/mst_ds-slurm}")
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
export SLURM_CONF=$folder/slurm.conf

fail() {
  echo "start.sh: error: $*" >&2
  exit 1
}

# Debian keeps the daemons where an ordinary user's PATH does not look.
PATH=$PATH:/usr/sbin:/sbin
for command in munged slurmctld slurmd sbatch; do
  command -v "$command" >/dev/null || fail "no $command; on Debian: apt-get install slurm-wlm munge"
done
[[ ! -e $SLURM_CONF ]] || fail "$folder holds a cluster already; stop it first: slurm/local/stop.sh $folder"
((${#folder} <= 80)) || fail "$folder is too long a path for a socket; allowed: 80 characters"

# Leaves nothing running.
give_up() {
  tail -n 5 "$folder"/*.log >&2 || true
  "$here/stop.sh" "$folder"
  fail "$@"
}

# A free port of each argument's variable, below those that the kernel gives to connections and above those that
# slurm/setup.sh gives to jobs.
find_ports() {
  local port=$((30000 + RANDOM % 2000)) name
  for name in "$@"; do
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do ((++port)); done
    printf -v "$name" %d "$port"
    ((++port))
  done
}

write_config() {
  local controller_port first_port second_port host
  host=$(uname -n) # $HOSTNAME may be inherited from elsewhere
  host=${host%%.*}
  find_ports controller_port first_port second_port
  cat >"$SLURM_CONF" <<CONFIG
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
# A job that was requeued waits until its former credential has expired.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
# Ports that jobs derive from their number are then not those of the next cluster on this machine.
FirstJobId=$((1 + RANDOM))
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=5
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$first_port CPUs=$CPUS_PER_NODE State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$second_port CPUs=$CPUS_PER_NODE State=UNKNOWN
PartitionName=local Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONFIG
}

start_daemons() {
  # --force: a folder under /tmp, which others can write, is good enough here.
  mungekey --create --keyfile="$folder/munge.key" &&
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
      --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>>"$folder/munged.log" &&
    slurmctld -i && has_begun slurmctld &&
    slurmd -N n1 && has_begun slurmd-n1 &&
    slurmd -N n2 && has_begun slurmd-n2
}

# SLURM's commands return before the daemon has left its number, by which stop.sh finds it.
has_begun() {
  local deadline=$((SECONDS + WAIT_SECONDS))
  until [[ -s $folder/$1.pid ]]; do
    if ((SECONDS >= deadline)); then return 1; fi
    sleep 0.1
  done
}

idle_nodes() { sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | sort -u | wc -l; }

mkdir -p "$folder"/{state,spool-n1,spool-n2}
chmod 755 "$folder"
write_config
start_daemons || give_up "a daemon did not start"
deadline=$((SECONDS + WAIT_SECONDS))
until (($(idle_nodes) == 2)); do
  ((SECONDS < deadline)) || give_up "the nodes were not ready within $WAIT_SECONDS s"
  sleep 0.2
done
echo "Two nodes of $CPUS_PER_NODE CPUs are ready. To use them:"
echo "  export SLURM_CONF=$SLURM_CONF"
echo "  sbatch --nodes=2 slurm/train.sbatch --ds_config ds_configs/zero3_mst.json"
echo "To stop them:"
echo "  slurm/local/stop.sh $folder"
