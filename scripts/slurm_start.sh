#!/usr/bin/env bash
# Start a throw-away Slurm on this machine, to test sweeps against: munged, slurmctld and two slurmd, on 127.0.0.1.
#
#   apt-get install -y --no-install-recommends slurm-wlm munge      (Debian 12: Slurm 22.05; nothing is started by that)
#   scripts/slurm_start.sh && . "${SLURM_LAB:-/tmp/mikv-slurm}/env.sh"
#   scripts/slurm_stop.sh
#
# All that belongs to it lies in $SLURM_LAB; nothing in /etc is read or written. No root, systemd, cgroups or GPU needed. CPUs,
# memory and GPUs are what the nodes claim to have (the GPUs are links to /dev/null: Slurm counts them and sets
# CUDA_VISIBLE_DEVICES, which on a machine without GPUs changes nothing).
set -euo pipefail
SLURM_LAB=${SLURM_LAB:-/tmp/mikv-slurm}
NODES=${NODES:-2}            # slurmd's: n1 ... nN
CPUS=${CPUS:-32}             # of each node, claimed
MEM=${MEM:-256000}           # MB of each node, claimed
GPUS=${GPUS:-4}              # of each node, claimed
BASE_PORT=${BASE_PORT:-26817} # slurmctld; slurmd k listens on BASE_PORT + k
WAIT=${WAIT:-60}             # seconds until all nodes must be idle
PATH=$PATH:/usr/sbin:/sbin

die() { echo "slurm_start: $*" >&2; exit 1; }
for program in munged munge unmunge slurmctld slurmd sinfo; do
  command -v "$program" >/dev/null || die "$program is not installed (packages slurm-wlm, munge)"
done
if [ -e "$SLURM_LAB" ] && [ ! -e "$SLURM_LAB/.slurm-lab" ]; then die "$SLURM_LAB holds something else"; fi
if [ -e "$SLURM_LAB/run/slurmctld.pid" ] && kill -0 "$(cat "$SLURM_LAB/run/slurmctld.pid")" 2>/dev/null; then
  die "one is running in $SLURM_LAB; stop it with scripts/slurm_stop.sh"
fi
for ((k = 0; k <= NODES; k++)); do
  if (exec 3<>"/dev/tcp/127.0.0.1/$((BASE_PORT + k))") 2>/dev/null; then die "port $((BASE_PORT + k)) is taken: set BASE_PORT"; fi
done
here=$(cd "$(dirname "$0")" && pwd)
trap 'status=$?; if [ $status != 0 ]; then tail -qn 8 "$SLURM_LAB"/log/*.log >&2 || true; SLURM_LAB=$SLURM_LAB "$here/slurm_stop.sh"; fi' EXIT

rm -rf "$SLURM_LAB"
mkdir -p "$SLURM_LAB"/{etc,run,log,state,dev,bin}
touch "$SLURM_LAB/.slurm-lab"
chmod 755 "$SLURM_LAB" "$SLURM_LAB"/{etc,run,log}  # munged refuses a key in a folder that others may write to
user=$(id -un)
host=$(hostname -s)  # slurmctld insists on the machine's own name; it need not resolve
socket=$SLURM_LAB/run/munge.sock
[ ${#socket} -lt 108 ] || die "SLURM_LAB is too long for the path of a socket"

(umask 077; head -c 1024 /dev/urandom > "$SLURM_LAB/etc/munge.key")
munged --key-file="$SLURM_LAB/etc/munge.key" --socket="$socket" --pid-file="$SLURM_LAB/run/munged.pid" \
  --log-file="$SLURM_LAB/log/munged.log" --seed-file="$SLURM_LAB/run/munged.seed"
for _ in $(seq 50); do [ -S "$socket" ] && break; sleep 0.1; done
munge -n -S "$socket" | unmunge -S "$socket" >/dev/null || die "munged does not answer"

for ((gpu = 0; gpu < GPUS; gpu++)); do ln -s /dev/null "$SLURM_LAB/dev/gpu$gpu"; done
echo "Name=gpu File=$SLURM_LAB/dev/gpu[0-$((GPUS - 1))]" > "$SLURM_LAB/etc/gres.conf"

# slurmd loads a cgroup plugin that nothing uses, and gives up where "autodetect" finds no version 1; 24.05 can do without
if [ "$(printf '%s\n' 24.05 "$(slurmd -V | cut -d' ' -f2)" | sort -V | head -n 1)" = 24.05 ]; then
  echo "CgroupPlugin=disabled" > "$SLURM_LAB/etc/cgroup.conf"
else
  echo "CgroupPlugin=cgroup/v1" > "$SLURM_LAB/etc/cgroup.conf"
fi

# cred_expire: a requeued job waits so long; its default makes that two minutes.
# EnforcePartLimits: a job that could never run is refused, instead of pending for ever.
# KillWait: seconds between SIGTERM and SIGKILL at the time limit.
cat > "$SLURM_LAB/etc/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$BASE_PORT
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$SLURM_LAB/state
SlurmctldPidFile=$SLURM_LAB/run/slurmctld.pid
SlurmctldLogFile=$SLURM_LAB/log/slurmctld.log
SlurmdPidFile=$SLURM_LAB/run/slurmd-%n.pid
SlurmdLogFile=$SLURM_LAB/log/slurmd-%n.log
SlurmdSpoolDir=$SLURM_LAB/state/spool-%n
ProctrackType=proctrack/linuxproc
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=$((MEM / CPUS))
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
MinJobAge=3600
KillWait=10
OverTimeLimit=0
InactiveLimit=0
JobRequeue=1
EnforcePartLimits=ALL
MessageTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
for ((k = 1; k <= NODES; k++)); do
  echo "NodeName=n$k NodeHostname=$host NodeAddr=127.0.0.1 Port=$((BASE_PORT + k)) CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS"

done >> "$SLURM_LAB/etc/slurm.conf"
nodes=$(for ((k = 1; k <= NODES; k++)); do printf '%sn%d' "$([ $k = 1 ] || echo ,)" "$k"; done)
cat >> "$SLURM_LAB/etc/slurm.conf" <<CONF
PartitionName=main Nodes=$nodes Default=YES MaxTime=1440 DefaultTime=10 PriorityTier=10
PartitionName=preemptible Nodes=$nodes MaxTime=1440 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=$nodes MaxTime=1440 DefaultTime=10 PriorityTier=20 PreemptMode=OFF
CONF
export SLURM_CONF=$SLURM_LAB/etc/slurm.conf
echo "export SLURM_CONF=$SLURM_CONF SLURM_LAB=$SLURM_LAB" > "$SLURM_LAB/env.sh"

# these return 0 and may give up afterwards: the nodes' state and the logs tell
slurmctld -i
for ((k = 1; k <= NODES; k++)); do slurmd -N "n$k"; done
for ((tenth = 0; ; tenth++)); do
  [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null || true)" != "$NODES" ] || break
  [ $tenth -lt $((10 * WAIT)) ] || die "the nodes are not idle after $WAIT s"
  if grep -hs 'fatal:' "$SLURM_LAB"/log/slurm*.log; then die "a daemon gave up"; fi
  sleep 0.1
done
sinfo -N -p main -o "%N %T %c CPUs %m MB %G"
echo "Slurm is up: . $SLURM_LAB/env.sh"
