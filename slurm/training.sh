# shellcheck shell=bash
# One attempt of a training job, and what becomes of the job after it. common.sh reads this file.

# ---------------------------------------------------------------------------------------------------------- snapshots

# snapshot FOLDER: what code this attempt runs
snapshot() {
  {
    git rev-parse HEAD 2>/dev/null || echo "no git revision"
    git status --porcelain 2>/dev/null
  } > "$1/revision.txt"
  git diff HEAD > "$1/changes.patch" 2>/dev/null || :
  scontrol show job "$SLURM_JOB_ID" > "$1/job.txt"
  local before=$RUN_SLURM/attempt_$((RESTART - 1))
  [ ! -e "$before/revision.txt" ] || { cmp -s "$1/revision.txt" "$before/revision.txt" && cmp -s "$1/changes.patch" "$before/changes.patch"; } ||
    say "warning: the code is not that of the attempt before: compare revision.txt and changes.patch of $before and $1"
}

# ----------------------------------------------------------------------------------------------------------- training

SIGNALLED=""
TERMINATED=""
STEP_PID=""
STATUS="none (never started)"
# kill -USR1 reaches the tasks through srun (TERM would end them); each torchrun passes it on, see --signals-to-handle.
on_usr1() { SIGNALLED=1; say "USR1: saving, then requeueing"; [ -z "$STEP_PID" ] || kill -USR1 "$STEP_PID" 2>/dev/null; }

# The tasks have TERM as well. Slurm may kill this script before its tasks have ended, so it says at once what comes next.
on_term() {
  TERMINATED=1
  ask_slurm
  if by_slurm; then close "$(requeued_by_slurm)"
  elif is_ending; then close "$(ended_by_slurm)"
  else say "TERM: waiting for the ranks"; fi
}

# distill DEFAULT_CONFIG [key=value ...]: one attempt of a training job
distill() {
  trap on_usr1 USR1
  trap on_term TERM # of scancel, the time limit, a failed node or a preemption
  local default=$1; shift
  CONFIG=$(absolute "${CONFIG:-$ROOT/$default}")
  existing CONFIG "$CONFIG"
  local stem=${CONFIG%.*}
  case $stem in */configs/*) stem=${stem##*/configs/} ;; *) stem=${stem##*/} ;; esac
  LOGDIR=$(absolute "${LOGDIR:-$ROOT/logs/$stem}")
  RUN_SLURM=$LOGDIR/slurm/$SLURM_JOB_ID
  ATTEMPT=$RUN_SLURM/attempt_$RESTART
  folder LOGDIR "$ATTEMPT/exit_codes"
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
  local before=$RUN_SLURM/attempt_$((RESTART - 1)) log
  [ ! -d "$before" ] || [ -e "$before/end.txt" ] ||
    say "attempt $((RESTART - 1)) has no last line: the node of this script failed, or Slurm killed the script"
  for log in "$RUN_SLURM"/*.log; do
    [ ! -e "$log" ] || wc -c < "$log" > "$ATTEMPT/${log##*/}.size" # what is added is of this attempt
  done
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

# ---------------------------------------------------------------------------------------------------------- its end

# Finished, failed, stopped, or to go on? What Slurm has decided counts first, then the ranks' own codes (torchrun makes 1 of
# all): 0 finished, 128 + n saved after signal n, 75 lost another rank, anything else failed. No code at all: killed from
# outside, for instance by USR1 before it could listen. A lost rank is most often a node's or a link's fault: the job goes on
# from its last checkpoint, on other nodes if Slurm has drained the bad one; after two such attempts in a row it is more likely
# the code's.
STUCK=75
settle() {
  local codes failed
  codes=$(codes_of "$ATTEMPT")
  failed=$(awk -v stuck=$STUCK '$1 > 0 && $1 < 128 && $1 != stuck' <<< "$codes" | tail -n 1)
  [ -n "$failed" ] || ! is_stuck "$ATTEMPT" || ! is_stuck "$RUN_SLURM/attempt_$((RESTART - 1))" || failed=$STUCK
  ! grep -qx 138 <<< "$codes" || SIGNALLED=1 # USR1 may have been sent to the ranks alone
  ask_slurm
  if [ "$codes" = 0 ]; then
    end 0 "finished"
  elif by_slurm; then
    end 1 "$(requeued_by_slurm)"
  elif [ -n "$failed" ]; then
    end "$failed" "failed with code $failed, not requeued: $(reason)"
  elif is_ending; then
    end 1 "$(ended_by_slurm)"
  elif [ -n "$PREEMPTED" ]; then
    requeue " after a preemption"
  elif [ -n "$TERMINATED" ] || was_asked_to_stop; then
    stop
  elif [ -z "$SIGNALLED" ] && ! is_stuck "$ATTEMPT"; then
    end 1 "failed, not requeued: ranks were killed from outside, by a signal before they trained or for want of memory (srun's status $STATUS):" \
      "see $RUN_SLURM/*.log; sbatch again to resume"
  elif is_stuck "$ATTEMPT"; then
    requeue " after losing a rank: see $RUN_SLURM/*.log"
  else
    requeue ""
  fi
}

# ask_slurm: what Slurm holds of this job now
ask_slurm() {
  local words word
  STATE="" REASON="" RESTARTS=$RESTART REQUEUE="" PREEMPTED=""
  read -r -a words <<< "$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null)"
  for word in "${words[@]}"; do
    case $word in
      JobState=*) STATE=${word#*=} ;;
      Reason=*) REASON=${word#*=} ;;
      Restarts=*) RESTARTS=${word#*=} ;;
      Requeue=*) REQUEUE=${word#*=} ;;
      PreemptTime=[0-9]*) PREEMPTED=1 ;;
    esac
  done
}

# by_slurm: Slurm has requeued the job already, for it counts the restart when it decides
by_slurm() { [ "$RESTARTS" -gt "$RESTART" ]; }

# is_ending: Slurm is about to end this script
is_ending() { [ -n "$STATE" ] && [ "$STATE" != RUNNING ]; }

requeued_by_slurm() { echo "Slurm requeues this job by itself: it will go on from its last checkpoint, if it has one"; }

# ended_by_slurm: why Slurm ends the job for good
ended_by_slurm() {
  case $REASON in
    TimeLimit) echo "the time limit came before the state was saved, not requeued: sbatch again to resume, with more time to save (SAVE_SECONDS)" ;;
    NodeFail) echo "a node failed, and Slurm does not requeue this job (Requeue=$REQUEUE): sbatch again to resume" ;;
    *)
      if [ "$REQUEUE" = 0 ]; then echo "ended by Slurm, whose own line says why, not requeued (Requeue=0): sbatch again to resume"
      else echo "cancelled, not requeued: sbatch again to resume"; fi ;;
  esac
}

# was_asked_to_stop: every rank saved after SIGTERM or SIGINT. torchrun sends SIGTERM itself when a rank has died, and that one
# leaves no code.
was_asked_to_stop() {
  [ -z "$(codes_of "$ATTEMPT" | grep -vxE '130|143')" ] &&
    [ "$(cat "$ATTEMPT"/exit_codes/* 2>/dev/null | wc -l)" = $((SLURM_JOB_NUM_NODES * NPROC)) ]
}

# stop: ends the job as cancelled. Another state would be a failure, or would start the jobs that wait for the finished run.
stop() {
  trap '' TERM
  local signal
  signal=$(codes_of "$ATTEMPT" | sed -n 's/130/SIGINT/p; s/143/SIGTERM/p' | tail -n 1)
  close "stopped as asked (${signal:-SIGTERM}; torchrun's exit code is then 1), not requeued: sbatch again to resume"
  [ "$STATE" != RUNNING ] || { scancel "$SLURM_JOB_ID" && sleep 60; } # Slurm ends this script
  exit 1
}

# requeue WHY: starts the job again
requeue() {
  [ "$RESTART" -lt "$MAX_RESTARTS" ] ||
    end 1 "not requeued: $RESTART restarts are as many as MAX_RESTARTS allows: sbatch again to resume"
  trap '' TERM
  close "requeued$1"
  scontrol requeue "$SLURM_JOB_ID" || { say "error: Slurm refuses to requeue: sbatch again to resume"; exit 1; }
  sleep 60 # Slurm ends this script
}

# close WORDS...: the attempt's last line, once
close() {
  [ "$(cat "$ATTEMPT/end.txt" 2>/dev/null)" = "$*" ] || say "$*"
  echo "$*" > "$ATTEMPT/end.txt"
}

# end CODE WORDS...: says the last line, and ends
end() {
  close "${@:2}"
  exit "$1"
}

# reason: the last error that this attempt's ranks named
reason() {
  local log lines=""
  for log in "$RUN_SLURM"/*.log; do
    lines+=$(tail -c "+$(($(cat "$ATTEMPT/${log##*/}.size" 2>/dev/null || echo 0) + 1))" "$log" | grep 'error: ' | grep -v '^srun: ' | tail -n 1)$'\n'
  done
  grep . <<< "$lines" | tail -n 1 | grep . || echo "see $RUN_SLURM/*.log"
}

# codes_of ATTEMPT: the exit codes that its ranks left
codes_of() { cat "$1"/exit_codes/* 2>/dev/null | sort -un; }

# is_stuck ATTEMPT: some rank of it lost another one
is_stuck() { codes_of "$1" | grep -qx $STUCK; }
