#!/usr/bin/env bash
# Stop what scripts/slurm_start.sh started, its jobs first. Only processes whose numbers it wrote down, and whose names fit.
set -u
SLURM_LAB=${SLURM_LAB:-/tmp/mikv-slurm}
[ -e "$SLURM_LAB/.slurm-lab" ] || exit 0
export SLURM_CONF=$SLURM_LAB/etc/slurm.conf
stop() {  # FILE NAME
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] || return 0
  kill "$pid"
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
  kill -9 "$pid"
}
# else the jobs outlive slurmd. Without a controller the commands would hang
if kill -0 "$(cat "$SLURM_LAB/run/slurmctld.pid" 2>/dev/null || echo none)" 2>/dev/null; then
  scancel --user "$(id -un)" 2>/dev/null
  for _ in $(seq 150); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
fi
for file in "$SLURM_LAB"/run/slurmd-*.pid; do stop "$file" slurmd; done
stop "$SLURM_LAB/run/slurmctld.pid" slurmctld
stop "$SLURM_LAB/run/munged.pid" munged
rm -f "$SLURM_LAB"/run/*.pid
