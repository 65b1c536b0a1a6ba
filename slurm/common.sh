# shellcheck shell=bash
# What all Slurm scripts share; they source it, it is not run by itself. Nothing here is particular to one cluster.
#
# From the sbatch line, all optional (`CONFIG=my.yaml LOGDIR=logs/my sbatch --nodes=2 slurm/distill_14b.slurm seed=1`):
#   OVERRIDES="a.b=1 'c.d={e: 2}'"   laid over the YAML; so are the arguments after the script's name
#   NPROC=8             processes a node (default: the GPUs that Slurm gives, else 1)
#   PYTHON=python       default: .venv/bin/python of the repository, else python3
#   CONTAINER=IMAGE     run inside it; CONTAINER_RUNTIME=pyxis|apptainer (default: what there is)
#   CONTAINER_MOUNTS    more folders to mount, comma-separated (the repository and the run folder are mounted anyway)
#   MAX_RESTARTS=20     how often a job may requeue itself
#   SAVE_SECONDS=240    time to save after USR1; keep it below the lead of --signal=B:USR1@300
# Paths are relative to the folder in which sbatch was called.

set -uo pipefail

say() { echo "$(date '+%F %T') slurm: $*"; }
die() { echo "slurm: error: $*" >&2; exit 2; } # one line; a job that ends like this is never requeued

# ------------------------------------------------------------------------------------------------------- where we are

: "${SLURM_JOB_ID:?submit this with sbatch}"
HERE=${SLURM_SUBMIT_DIR:-$PWD}
cd "$ROOT" || die "no folder $ROOT: set FEWSTEP_ROOT to the repository"
[ -f train.py ] || die "$ROOT is not the repository: set FEWSTEP_ROOT to it"
RESTART=${SLURM_RESTART_COUNT:-0}
MAX_RESTARTS=${MAX_RESTARTS:-20}
SAVE_SECONDS=${SAVE_SECONDS:-240}
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
CPUS=${SLURM_CPUS_ON_NODE:-1}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC: give the number of processes a node"
[[ $MAX_RESTARTS =~ ^[0-9]+$ && $SAVE_SECONDS =~ ^[0-9]+$ ]] || die "MAX_RESTARTS and SAVE_SECONDS are whole numbers"

# absolute PATH: as the one who called sbatch meant it
absolute() { case $1 in /*) echo "$1" ;; *) echo "$HERE/$1" ;; esac; }

# existing NAME PATH: dies unless there is such a file or folder
existing() { [ -e "$2" ] || die "$1=$2: there is no such file or folder"; }

# ------------------------------------------------------------------------------------------------------- environment

# The first node of the list; it also names the rendezvous of torchrun. Ports from 20000 lie below the range from which
# the kernel takes ports for outgoing connections; the job's number keeps two jobs on one node apart.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# Each of these gives way to a value set on the sbatch line.
threads=$((CPUS / NPROC))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 8 ? 8 : threads > 0 ? threads : 1))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export PYTHONUNBUFFERED=1      # else the last lines before a crash are lost
export PYTHONFAULTHANDLER=1    # a stack for a segmentation fault in a kernel
# Fragmentation, not need, is what first exhausts a GPU when rollouts differ in length.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # one line a problem; INFO shows which network was chosen
# A collective that hangs ends the job after the group's timeout instead of holding the GPUs until the time limit ...
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# ... and the last collectives of each rank are dumped then, which shows who was missing.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# InfiniBand: 4.096 us * 2^22 = 17 s before a lost packet is sent again, 7 times: rides out a flapping link or a
# rerouting switch. NCCL's own default gives up sooner.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# Cluster-dependent, so not set here. NCCL finds InfiniBand by itself; where it takes the wrong card or interface:
#   NCCL_IB_HCA=mlx5           only cards of this name (a storage card among them slows every ring)
#   NCCL_SOCKET_IFNAME=ib0     bootstrap over this interface; GLOO_SOCKET_IFNAME=ib0 likewise for gloo's groups
#   NCCL_IB_GID_INDEX=3        RoCE v2
#   NCCL_IB_DISABLE=1          to find out whether InfiniBand is what fails

# torchrun passes a signal on to its workers and by default kills them 30 s later: less than a step and a save of a
# large model. It must have given up before Slurm's time limit, so that the job can still be requeued.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SAVE_SECONDS

# --------------------------------------------------------------------------------------------------------- containers

IMAGE=()   # options of srun that start a container (pyxis)
INSIDE=()  # what stands before a command to run it inside one (apptainer)
# Without these two a step may get one core a task: srun takes over neither the job's cores nor its --cpus-per-task.
SRUN=(srun --kill-on-bad-exit=0 --cpus-per-task="$CPUS" --cpu-bind=none)

# use_container FOLDER...: mounts these too
use_container() {
  [ -n "${CONTAINER:-}" ] || return 0
  PYTHON=${CONTAINER_PYTHON:-python3} # a venv of the host does not work inside
  local mounts=("$ROOT" "$@") extra=() folder list=""
  IFS=, read -r -a extra <<< "${CONTAINER_MOUNTS:-}"
  local runtime=${CONTAINER_RUNTIME:-}
  if [ -z "$runtime" ]; then
    if srun --help 2>&1 | grep -q -- --container-image; then runtime=pyxis
    elif hash apptainer 2>/dev/null; then runtime=apptainer
    else die "CONTAINER=$CONTAINER: neither pyxis (srun --container-image) nor apptainer is here: unset it for a venv"; fi
  fi
  for folder in "${mounts[@]}" "${extra[@]}"; do
    case $folder in *:*) list+=",$folder" ;; *) list+=",$folder:$folder" ;; esac
  done
  case $runtime in
    pyxis) IMAGE=(--container-image="$CONTAINER" --container-mounts="${list#,}" --container-workdir="$ROOT") ;;
    apptainer)
      hash apptainer 2>/dev/null || die "CONTAINER_RUNTIME=apptainer: there is no such program on $(hostname)"
      INSIDE=(apptainer exec --nv --bind "${list#,}" --pwd "$ROOT" "$CONTAINER")
      ;;
    *) die "CONTAINER_RUNTIME=$runtime: give pyxis or apptainer" ;;
  esac
}

# one COMMAND...: runs it once, on the first node, in the container where there is one
one() { "${SRUN[@]}" "${IMAGE[@]}" --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${INSIDE[@]}" "$@" < /dev/null; }


# ---------------------------------------------------------------------------------------------------------- snapshots

# Words of OVERRIDES (quotes are kept together) and of the script's arguments.
overrides() {
  OVERRIDDEN=()
  local words
  words=$(xargs -r -n 1 printf '%s\n' <<< "${OVERRIDES:-}" 2>/dev/null) || die "OVERRIDES=$OVERRIDES: close its quotes"
  [ -z "$words" ] || mapfile -t OVERRIDDEN <<< "$words"
  OVERRIDDEN+=("$@")
}

# snapshot FOLDER: what code this attempt runs
snapshot() {
  {
    git rev-parse HEAD 2>/dev/null || echo "no git revision"
    git status --porcelain 2>/dev/null
  } > "$1/revision.txt"
  git diff HEAD > "$1/changes.patch" 2>/dev/null || :
  scontrol show job "$SLURM_JOB_ID" > "$1/job.txt"
  local file before=$RUN_SLURM/attempt_$((RESTART - 1))
  for file in revision.txt changes.patch; do
    [ ! -e "$before/$file" ] || cmp -s "$1/$file" "$before/$file" ||
      say "warning: the code is not that of the attempt before: compare $before/$file and $1/$file"
  done
}

# ----------------------------------------------------------------------------------------------------------- training

SIGNALLED=""
TERMINATED=""
STEP_PID=""
STATUS="none (never started)"
# kill -USR1 reaches the tasks through srun (TERM would end them); each torchrun passes it on, see --signals-to-handle.
on_usr1() { SIGNALLED=1; say "USR1: saving, then requeueing"; [ -z "$STEP_PID" ] || kill -USR1 "$STEP_PID" 2>/dev/null; }

# distill DEFAULT_CONFIG [key=value ...]: one attempt of a training job
distill() {
  trap on_usr1 USR1
  trap 'TERMINATED=1' TERM # of scancel, or of the time limit: the tasks have it as well
  local default=$1; shift
  CONFIG=$(absolute "${CONFIG:-$ROOT/$default}")
  existing CONFIG "$CONFIG"
  local stem=${CONFIG%.*}
  case $stem in */configs/*) stem=${stem##*/configs/} ;; *) stem=${stem##*/} ;; esac
  LOGDIR=$(absolute "${LOGDIR:-$ROOT/logs/$stem}")
  RUN_SLURM=$LOGDIR/slurm/$SLURM_JOB_ID
  ATTEMPT=$RUN_SLURM/attempt_$RESTART
  mkdir -p "$ATTEMPT/exit_codes" || die "LOGDIR=$LOGDIR: the folder cannot be made"
  rm -f "$ATTEMPT"/exit_codes/*
  use_container "$LOGDIR"
  overrides "$@"
  check_nodes
  freeze_config
  snapshot "$ATTEMPT"
  [ -n "$SIGNALLED" ] || run_attempt
  settle
}

# Every node must see the code, the interpreter and the run folder, and have its GPUs: else some rank fails minutes later.
check_nodes() {
  local complaints
  local seen=("$ROOT/train.py" "$ATTEMPT")
  [[ $PYTHON != /* || -n ${CONTAINER:-} ]] || seen+=("$PYTHON")
  # shellcheck disable=SC2016  # expanded on the nodes
  complaints=$("${SRUN[@]}" --ntasks-per-node=1 bash -c '
    for path in "$@"; do [ -e "$path" ] || echo "$SLURMD_NODENAME does not see $path: use a shared disk"; done
    if hash nvidia-smi 2>/dev/null && [ "$(nvidia-smi -L | grep -c ^GPU)" -lt "$0" ]; then
      echo "$SLURMD_NODENAME has fewer than $0 working GPUs"
    fi' "$NPROC" "${seen[@]}" < /dev/null 2> "$ATTEMPT/check.txt") ||
    die "srun could not start on every node: $(tail -n 1 "$ATTEMPT/check.txt")"
  [ -z "$complaints" ] || die "$(head -n 1 <<< "$complaints")"
}

# The config as checked, overrides included, is kept by the job's first attempt and used by all: whoever edits the YAML
# meanwhile changes the next job, not this one.
freeze_config() {
  [ -s "$RUN_SLURM/config.yaml" ] && return
  local text
  if ! text=$(one "$PYTHON" train.py --config_path "$CONFIG" --print_config "${OVERRIDDEN[@]}" 2> "$ATTEMPT/check.txt"); then
    die "$(grep -h 'error: ' "$ATTEMPT/check.txt" | grep -v '^srun: ' | head -n 1 | grep . || tail -n 1 "$ATTEMPT/check.txt")"
  fi
  cp "$CONFIG" "$RUN_SLURM/original.yaml"
  printf '%s\n' "$text" > "$RUN_SLURM/config.yaml"
}

# One torchrun a node. Rank numbers follow the nodes' names; %N: a log for each node, appended to by later attempts.
run_attempt() {
  export EXIT_CODES=$ATTEMPT/exit_codes
  say "attempt $RESTART: $SLURM_JOB_NUM_NODES nodes x $NPROC processes, $MASTER_ADDR:$MASTER_PORT, logs in $RUN_SLURM"
  # --wait: when one node's torchrun has ended, the others have 2 minutes to follow
  "${SRUN[@]}" "${IMAGE[@]}" --wait=120 --ntasks-per-node=1 --open-mode=append --output="$RUN_SLURM/%N.log" \
    "${INSIDE[@]}" "$PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$NPROC" --max_restarts=0 \
    --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv_id="$SLURM_JOB_ID.$RESTART" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    train.py --config_path "$RUN_SLURM/config.yaml" --logdir "$LOGDIR" --resume auto < /dev/null &
  STEP_PID=$!
  # a trap interrupts wait, and srun goes on: wait again
  while kill -0 "$STEP_PID" 2>/dev/null; do wait "$STEP_PID"; STATUS=$?; done
  STEP_PID=""
}

# Finished, failed, or to go on? The ranks' own codes decide (torchrun makes 1 of all): 0 finished, 128 + n saved after
# signal n, 75 lost another rank, anything else failed. No code at all: killed from outside, for instance by USR1 before
# it could listen. A lost rank is most often a node's or a link's fault: the job goes on from its last checkpoint, on
# other nodes if Slurm has drained the bad one; after two such attempts in a row it is more likely the code's.
STUCK=75
settle() {
  local codes failed reason
  codes=$(codes_of "$ATTEMPT")
  failed=$(awk -v stuck=$STUCK '$1 > 0 && $1 < 128 && $1 != stuck' <<< "$codes" | tail -n 1)
  [ -n "$failed" ] || ! is_stuck "$ATTEMPT" || ! is_stuck "$RUN_SLURM/attempt_$((RESTART - 1))" || failed=$STUCK
  if [ -n "$failed" ]; then
    reason=$(grep -h 'error: ' "$RUN_SLURM"/*.log | grep -v '^srun: ' | tail -n 1)
    say "failed with code $failed, not requeued: ${reason:-see $RUN_SLURM/*.log}"
    exit "$failed"
  elif [ "$codes" = 0 ]; then
    say "finished"
    exit 0
  elif [ -n "$TERMINATED" ] || { [ -z "$SIGNALLED" ] && ! is_stuck "$ATTEMPT"; }; then
    say "stopped, not requeued (srun's status $STATUS, no USR1 alone): see $RUN_SLURM/*.log; sbatch again to resume"
    exit 1
  elif [ "$RESTART" -ge "$MAX_RESTARTS" ]; then
    say "not requeued: $RESTART restarts are as many as MAX_RESTARTS allows: sbatch again to resume"
    exit 1
  fi
  say "requeued$(is_stuck "$ATTEMPT" && echo " after losing a rank: see $RUN_SLURM/*.log")"
  scontrol requeue "$SLURM_JOB_ID" || { say "error: Slurm refuses to requeue: sbatch again to resume"; exit 1; }
  sleep 60 # Slurm ends this script
}

# codes_of ATTEMPT: the exit codes that its ranks left
codes_of() { cat "$1"/exit_codes/* 2>/dev/null | sort -un; }

# is_stuck ATTEMPT: some rank of it lost another one
is_stuck() { codes_of "$1" | grep -qx $STUCK; }
