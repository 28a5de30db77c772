#!/usr/bin/env bash
# Keeps srun from taking a run that was asked to stop for one that failed: slurm/stoppable.sh file command ...
# Ranks that saved and stopped end with 75, one a moment before the others, whom srun --kill-on-bad-exit would kill: it
# would then tell of a kill, and not of 75. Here 75 becomes 0, and rank 0 leaves `file` to say so. Other codes stay.
set -euo pipefail

readonly ASKED_TO_STOP=75 # EXIT_STOPPED of mst_ds/command_line/exit_protocol.py
file=$1
shift

# Some plugins of SLURM signal only the task itself, which is this script.
signalled=
child=
forward() {
  # shellcheck disable=SC2317 # the traps call it
  if [[ -n $child && -n $signalled ]]; then kill -s "$signalled" "$child" 2>/dev/null || true; fi
}
trap 'signalled=USR1; forward' USR1
trap 'signalled=TERM; forward' TERM
"$@" &
child=$!
forward # what came before there was a child

code=0
wait "$child" || code=$?
while [[ -n $signalled ]]; do # the signal broke the wait off
  signalled=
  code=0
  wait "$child" || code=$?
done

if ((code == ASKED_TO_STOP)); then
  if ((SLURM_PROCID == 0)); then touch "$file"; fi
  exit 0
fi
exit "$code"
