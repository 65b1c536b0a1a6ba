#!/usr/bin/env bash
# slurm_up.sh - a real Slurm (munged + slurmctld + N x slurmd) on ONE machine, no systemd.
# Debian 12 packages (Slurm 22.05.8). Needs root. Idempotent: a second call on a running
# cluster returns at once (restarting any daemon that has died).
#
#   ./slurm_up.sh && . $SLURM_FIX_DIR/env.sh && sbatch job.sh ;  ./slurm_down.sh
#
# Everything lives in $SLURM_FIX_DIR; outside it only the packages and tagged lines in
# /etc/hosts (removed by slurm_down.sh). /etc/slurm and /etc/munge are not used.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
D=${SLURM_FIX_DIR:-${TMPDIR:-/tmp}/slurm-fixture}   # keep short: unix socket paths < 108 chars
NODES=${SLURM_FIX_NODES:-2}                  # node0 .. node{N-1}
TOPO=${SLURM_FIX_TOPO:-Sockets=2 CoresPerSocket=56 ThreadsPerCore=2}  # PRETENDED: 224 cpus
MEM=${SLURM_FIX_MEM:-2000000}                # PRETENDED MB of memory and of /tmp per node
GPUS=${SLURM_FIX_GPUS:-8}                    # PRETENDED gpus per node (0 = no gres)
GPUTYPE=${SLURM_FIX_GPUTYPE:-h100}           # --gpus-per-node=8 and =h100:8 both match
PARTS=${SLURM_FIX_PARTITIONS:-debug gpu}     # first one is the default partition
FEATURES=${SLURM_FIX_FEATURES:-h100,ib}      # for --constraint=...
TRACK=${SLURM_FIX_PROCTRACK:-auto}           # auto | cgroup | linuxproc, see 3.
CTLPORT=${SLURM_FIX_PORT:-16817}             # slurmctld; node i listens on PORT+10+i
WAIT_S=${SLURM_FIX_TIMEOUT:-60}              # seconds to wait for idle
say() { echo "slurm_up: $*" >&2; }
die() { say "$*"; exit 1; }
cannot() { say "$*"; exit 77; } # this machine cannot have it: no defect
[ "$(id -u)" = 0 ] || cannot "must be root"

# --- 1. packages (~13 MB; RUNLEVEL=1 keeps the debs from starting their own services)
if ! hash slurmctld slurmd sbatch munged 2>/dev/null; then
  hash apt-get 2>/dev/null || cannot "Slurm is not installed and there is no apt-get"
  say "installing packages"
  for try in 1 2 3; do
    apt-get update -qq >/dev/null &&
      DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge >/dev/null && break
    [ $try = 3 ] && cannot "apt-get install failed"; sleep 3
  done
  hash -r
fi

alive() { # alive NAME: pid file exists and the pid really is that program
  local p; p=$(cat "$D/run/$1.pid" 2>/dev/null) && [ -n "$p" ] &&
    grep -qa -- "${1%%-*}" "/proc/$p/cmdline" 2>/dev/null
}
mkdir -p "$D"/{etc,run,log,state,munge,spool,dev}
chmod 755 "$D" "$D"/*/; chmod 700 "$D/state"
exec 9> "$D/run/up.lock"; flock 9            # parallel callers queue up here

# --- 2. node names. Each slurmd gets its own UTS namespace, so `hostname` and
# socket.gethostname() in jobs say node0/node1, and its own loopback address, so that
# torchrun's "am I the rendezvous host?" test is true on exactly one node.
# Where unshare is refused all names map to 127.0.0.1 (c10d then falls back by itself).
if unshare --uts true 2>/dev/null; then NS="unshare --uts"; else NS=""; fi
addr() { [ -n "$NS" ] && echo "127.0.1.$((10 + $1))" || echo 127.0.0.1; }
{ sed '/# slurm-fixture$/d' /etc/hosts
  for ((i = 0; i < NODES; i++)); do echo "$(addr $i) node$i # slurm-fixture"; done
} > "$D/etc/hosts.new"
cmp -s "$D/etc/hosts.new" /etc/hosts || cat "$D/etc/hosts.new" > /etc/hosts  # no rename: may be a bind mount

# --- 3. configuration
# proctrack/cgroup is what production has: step signals reach only the direct children of
# slurmstepd (torchrun, not its workers) and KILL reaches every descendant. It needs a
# writable v1 freezer hierarchy. With linuxproc a signal reaches ALL descendants.
if [ "$TRACK" = auto ]; then
  TRACK=linuxproc; F=/sys/fs/cgroup/freezer
  [ -e $F/release_agent ] && mkdir -p $F/slurm_node0 2>/dev/null && TRACK=cgroup
fi
GRES=""
if [ "$GPUS" -gt 0 ]; then
  # Copies of /dev/null stand in for /dev/nvidia*: slurmd only stat()s them, and with File=
  # it sets CUDA_VISIBLE_DEVICES=0..7 like a real node. No cgroup => no device control.
  # (mknod refused: plain files; jobs are still accepted but CUDA_VISIBLE_DEVICES stays unset)
  for ((g = 0; g < GPUS; g++)); do
    f=$D/dev/nvidia$g; [ -c "$f" ] || { rm -f "$f"; mknod -m 666 "$f" c 1 3 2>/dev/null; } || : > "$f"
  done
  GRES="Gres=gpu:$GPUTYPE:$GPUS"
  echo "AutoDetect=off
Name=gpu Type=$GPUTYPE File=$D/dev/nvidia[0-$((GPUS - 1))]" > "$D/etc/gres.conf"
else : > "$D/etc/gres.conf"; fi
{ cat <<CONF
ClusterName=fixture
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$CTLPORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# own munged; cred_expire is ALSO the delay before a requeued job may start again (default 120 s)
AuthInfo=socket=$D/munge/munge.socket,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.slurm.pid
SlurmdPidFile=$D/run/%n.slurm.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
# no database, no real hardware, no cgroup limits
ProctrackType=proctrack/$TRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# fast turn-around
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=5
JobRequeue=1
EnforcePartLimits=ALL
KillWait=5
MinJobAge=3600
CompleteWait=0
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
CONF
  for ((i = 0; i < NODES; i++)); do
    # Debian builds with --enable-multiple-slurmd; distinct NodeHostnames work without it too.
    echo "NodeName=node$i NodeHostname=node$i NodeAddr=$(addr $i) Port=$((CTLPORT + 10 + i))" \
      "$TOPO RealMemory=$MEM TmpDisk=$MEM Feature=$FEATURES $GRES State=UNKNOWN"
  done
  def=YES
  for p in $PARTS; do
    echo "PartitionName=$p Nodes=ALL Default=$def MaxTime=INFINITE State=UP"; def=NO
  done
} > "$D/etc/slurm.conf.new"
if alive slurmctld && ! cmp -s "$D/etc/slurm.conf.new" "$D/etc/slurm.conf"; then
  die "already up with other settings: run slurm_down.sh first"
fi
mv "$D/etc/slurm.conf.new" "$D/etc/slurm.conf"
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$D/etc/cgroup.conf"
echo "export SLURM_CONF=$D/etc/slurm.conf" > "$D/env.sh"
export SLURM_CONF=$D/etc/slurm.conf

# --- 4. daemons (foreground mode under setsid, so $! is the daemon's pid)
start() { # start NAME CMD...
  local n=$1; shift
  alive "$n" && return
  setsid "$@" >> "$D/log/$n.out.log" 2>&1 < /dev/null 9>&- &
  echo $! > "$D/run/$n.pid"
}
if [ ! -s "$D/munge/munge.key" ]; then
  (umask 077; head -c 1024 /dev/urandom > "$D/munge/munge.key")
fi
start munged munged --foreground --force --key-file="$D/munge/munge.key" --num-threads=4 \
  --socket="$D/munge/munge.socket" --pid-file="$D/run/munged.munge.pid" \
  --log-file="$D/log/munged.log" --seed-file="$D/munge/munge.seed"
for ((t = 0; t < 50; t++)); do munge -n --socket="$D/munge/munge.socket" >/dev/null 2>&1 && break; sleep .1; done
start slurmctld slurmctld -D
for ((i = 0; i < NODES; i++)); do
  mkdir -p "$D/spool/node$i"
  start "slurmd-node$i" $NS sh -c "[ -z '$NS' ] || hostname node$i; exec slurmd -D -N node$i"
done

# --- 5. wait until every node is up and free (or, on a re-run, busy with jobs)
for ((t = 0; t < WAIT_S * 5; t++)); do
  n=$(sinfo -h -N -p "${PARTS%% *}" -o %T 2>/dev/null | grep -cE '^(idle|mixed|allocated|planned|completing)$' || :)
  [ "$n" = "$NODES" ] && { say "$NODES node(s) up after ${SECONDS}s, proctrack/$TRACK; now: . $D/env.sh"; exit 0; }
  sleep .2
done
sinfo -N -l >&2 || :; tail -n 20 "$D"/log/*.out.log >&2; die "nodes not up after ${WAIT_S}s"
