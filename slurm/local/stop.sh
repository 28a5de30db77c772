#!/usr/bin/env bash
# Ends the cluster that start.sh made in a folder, with its jobs, and removes the folder: slurm/local/stop.sh [folder]
set -euo pipefail

readonly WAIT_SECONDS=20
folder=$(realpath -m "${1:-/tmp/mst_ds-slurm}")
export SLURM_CONF=$folder/slurm.conf

if ! [[ -f $SLURM_CONF ]]; then
  echo "stop.sh: no cluster in $folder"
  exit 0
fi

# Waits for a command to succeed, and says whether it did.
within_limit() {
  local deadline=$((SECONDS + WAIT_SECONDS))
  until "$@"; do
    if ((SECONDS >= deadline)); then return 1; fi
    sleep 0.1
  done
}

is_alive() { [[ -e /proc/$1 && $(ps -o stat= -p "$1") != Z* ]]; }
is_dead() { ! is_alive "$1"; }
has_no_jobs() { [[ -z $(squeue --noheader 2>/dev/null) ]]; }

end() {
  kill "$1" 2>/dev/null || return 0
  within_limit is_dead "$1" || kill_now "$1"
}

# A kill only begins to end a process.
kill_now() {
  kill -KILL "$1" 2>/dev/null || return 0
  within_limit is_dead "$1" || true
}

# Processes that jobs of this cluster started, wherever they went: the tracking by process group loses some.
of_jobs() {
  local environment
  for environment in /proc/[0-9]*/environ; do
    if { tr '\0' '\n' <"$environment" | grep -qx "SLURM_CONF=$SLURM_CONF" &&
      tr '\0' '\n' <"$environment" | grep -q '^SLURM_JOB_ID='; } 2>/dev/null; then
      basename "$(dirname "$environment")"
    fi
  done
}

if [[ -e $folder/slurmctld.pid ]] && is_alive "$(<"$folder/slurmctld.pid")"; then
  squeue --noheader --format=%A 2>/dev/null | sort -u | xargs --no-run-if-empty scancel 2>/dev/null || true
  within_limit has_no_jobs || echo "stop.sh: jobs did not end within $WAIT_SECONDS s, and are killed" >&2
fi
for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
  if [[ -e $folder/$daemon.pid ]]; then end "$(<"$folder/$daemon.pid")"; fi
done
for pid in $(of_jobs); do
  if ((pid != $$)); then kill_now "$pid"; fi
done
rm -rf "$folder"
