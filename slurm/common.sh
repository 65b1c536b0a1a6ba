# shellcheck shell=bash
# What all Slurm scripts share; they source it, it is not run by itself. What is particular to a cluster goes to sbatch, or into
# SETUP.
#
# From the sbatch line, all optional (`CONFIG=my.yaml LOGDIR=logs/my sbatch --nodes=2 slurm/distill_14b.slurm seed=1`):
#   OVERRIDES="a.b=1 'c.d={e: 2}'"   laid over the YAML; so are the arguments after the script's name
#   SETUP=FILE          bash that is read first: `module load`, `conda activate`, NCCL's variables, PYTHON
#   NPROC=8             processes a node (default: the GPUs that Slurm gives, else 1)
#   PYTHON=python       default: .venv/bin/python of the repository, else python3
#   CONTAINER=IMAGE     run inside it; CONTAINER_RUNTIME=pyxis|apptainer (default: what there is)
#   CONTAINER_MOUNTS    more folders to mount, comma-separated (the repository and the run folder are mounted anyway)
#   CONTAINER_PYTHON    the interpreter inside (default: python3)
#   FEWSTEP_ROOT        the repository (default: the folder above that of the script)
# For jobs that train:
#   MAX_RESTARTS=20     after how many restarts, Slurm's own counted, a job no longer requeues itself
#   SAVE_SECONDS=240    time to save after USR1; keep it below the lead of --signal=B:USR1@300
# For arrays:
#   SHARDS=16           parts of the work (default: the tasks of the array, which then begin at 0)
# CONFIG, LOGDIR, SETUP and the paths that a script names itself are relative to the folder in which sbatch was called. All others
# are relative to the repository, in which the programs run: those in overrides, options and configs, PYTHON and CONTAINER.

set -uo pipefail

say() { echo "$(date '+%F %T') slurm: $*"; }
die() { echo "slurm: error: $*" >&2; exit 2; } # one line; a job that ends like this is never requeued

# ------------------------------------------------------------------------------------------------------- where we are

[ -n "${SLURM_JOB_ID:-}" ] || die "this is no job: submit it with sbatch"
# The settings would be their defaults, and the run another one than was meant.
[[ ! ${SLURM_EXPORT_ENV:-} =~ ^(NONE|NIL)$ ]] ||
  die "--export=$SLURM_EXPORT_ENV keeps the settings from the job: leave it out, or name them, as in --export=CONFIG=my.yaml,LOGDIR=logs/my"
export SLURM_EXPORT_ENV=ALL # else srun takes sbatch's --export for its own, and its tasks lack what is exported here
HERE=${SLURM_SUBMIT_DIR:-$PWD}
ROOT=$(cd "$ROOT" && pwd)
cd "$ROOT" || exit 2
[ -f train.py ] || die "$ROOT is not the repository: set FEWSTEP_ROOT to it"

# absolute PATH: as the one who called sbatch meant it
absolute() { case $1 in /*) echo "$1" ;; *) echo "$HERE/$1" ;; esac; }

# existing NAME PATH: dies unless there is such a file or folder
existing() { [ -e "$2" ] || die "$1=$2: there is no such file or folder"; }

# folder NAME PATH: makes it
folder() {
  local why
  why=$(mkdir -p "$2" 2>&1) || die "$1: $2 cannot be made: ${why##*: }"
}

# needs NAME WHAT ...: dies where one of these settings is not set
needs() {
  while [ $# -gt 0 ]; do
    [ -n "${!1:-}" ] || die "set $1 ($2): the head of the script has an example"
    shift 2
  done
}

if [ -n "${SETUP:-}" ]; then
  SETUP=$(absolute "$SETUP")
  existing SETUP "$SETUP"
  set +u # conda's and the modules' own scripts read variables that are not set
  # shellcheck disable=SC1090  # the user's file
  . "$SETUP" || die "SETUP=$SETUP: its last command failed with code $?"
  set -u
fi

RESTART=${SLURM_RESTART_COUNT:-0}
MAX_RESTARTS=${MAX_RESTARTS:-20}
SAVE_SECONDS=${SAVE_SECONDS:-240}
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
CPUS=${SLURM_CPUS_ON_NODE:-1}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC: give the number of processes a node"
[[ $MAX_RESTARTS =~ ^[0-9]+$ && $SAVE_SECONDS =~ ^[0-9]+$ ]] || die "MAX_RESTARTS and SAVE_SECONDS are whole numbers"

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

# on_gpus PROGRAM.py ...: in one process, or in one for each GPU of the task, which share its work
on_gpus() {
  local launch=("$PYTHON")
  [ "$NPROC" = 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node="$NPROC" --)
  one "${launch[@]}" "$@"
}

# ---------------------------------------------------------------------------------------------------------- overrides

# Words of OVERRIDES (quotes are kept together) and of the script's arguments.
overrides() {
  OVERRIDDEN=()
  local words
  words=$(xargs -r -n 1 printf '%s\n' <<< "${OVERRIDES:-}" 2>/dev/null) || die "OVERRIDES=$OVERRIDES: close its quotes"
  [ -z "$words" ] || mapfile -t OVERRIDDEN <<< "$words"
  OVERRIDDEN+=("$@")
}

# ------------------------------------------------------------------------------------------------------------- arrays

# part_of_array: PART=i/n, what this task of an array does. Without SHARDS the tasks have to be 0 to n - 1: others would leave
# parts undone.
part_of_array() {
  local task=${SLURM_ARRAY_TASK_ID:-0} count=${SLURM_ARRAY_TASK_COUNT:-1}
  local parts=${SHARDS:-$count}
  [[ $parts =~ ^[1-9][0-9]*$ ]] || die "SHARDS=$parts: give the number of parts"
  [ -n "${SHARDS:-}" ] || [ $((${SLURM_ARRAY_TASK_MAX:-0} + 1)) = "$count" ] ||
    die "--array: $count tasks up to number $SLURM_ARRAY_TASK_MAX leave parts out: count them from 0, or say SHARDS=n of how many they are"
  [ "$task" -lt "$parts" ] || die "SHARDS=$parts: there is no part $task, they count from 0"
  PART=$task/$parts
}

# shellcheck source=slurm/training.sh
. "$ROOT/slurm/training.sh"
