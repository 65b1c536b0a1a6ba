#!/usr/bin/env bash
# The whole way on CPU cores: teacher -> causal initialisation -> Self-Forcing + DMD -> videos -> report.
#   bash scripts/quickstart.sh [key=value ...]   (overrides for all trainings)
#   RUN_DIR=logs/quickstart  where everything goes   PYTHON=.venv/bin/python  which interpreter
#   COUNT=400  videos judged a row of the table
# Started again after Ctrl-C, a kill or a failure it goes on where it stopped; finished stages are skipped.
set -euo pipefail
# job control gives each stage a process group of its own: Ctrl-C reaches only this script, which asks the stage to
# stop just once (a second signal would make a training stop without saving)
set -m
cd "$(dirname "$0")/.."

RUN_DIR=${RUN_DIR:-logs/quickstart}
COUNT=${COUNT:-400}
overrides=("$@")
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
# Cores without bf16 instructions convert every number on the way: several times slower than their fp32.
NATIVE_BF16=$(grep -qwE 'avx512_bf16|amx_bf16|bf16' /proc/cpuinfo 2>/dev/null && echo 1 || true)
[[ $NATIVE_BF16 ]] || overrides=(training.precision=fp32 "$@")
CORES=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
RANKS=$((CORES > 1 ? 2 : 1))
GLOBAL_BATCH=16 # of configs/toy/*.yaml: split over the ranks it stays the same, and so do the losses
export PYTHON OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive CUDA_VISIBLE_DEVICES= PYTHONUNBUFFERED=1

# glibc gives large blocks back to the system at once and pays for each page again: a tenth of the sampling time
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000

say() { printf '\n==> [%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
die() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

# ------------------------------------------------------------------------------------------------ stages as processes

groups=" " # ids of those that are running
launch() { # starts a command in the background, in its own process group: its id is $!
  "$@" </dev/null &
  groups+="$! "
}
finish() { # finish ID STAGE: waits for it, and ends everything if it failed
  local code=0
  wait "$1" || code=$?
  groups=${groups/ $1 / }
  ((code == 0)) && return
  halt
  die "the stage $2 failed (exit code $code, see above); the same command goes on from here"
}
end() { # asks a group to stop and waits until all of it has
  groups=${groups/ $1 / }
  kill -TERM -- "-$1" 2>/dev/null || true
  gone "$1"
}
gone() { # waits until nothing of a group is left
  while kill -0 -- "-$1" 2>/dev/null; do
    wait "$1" 2>/dev/null || true
    sleep 0.1
  done
}
halt() {
  trap '' INT TERM HUP
  local id
  for id in $groups; do kill -TERM -- "-$id" 2>/dev/null || true; done
  for id in $groups; do gone "$id"; done
}
stopped() {
  halt
  printf '\nquickstart: stopped, and saved; the same command goes on from here\n' >&2
  exit "$1"
}
trap 'stopped 130' INT
trap 'stopped 143' TERM
trap 'stopped 129' HUP

# ------------------------------------------------------------------------------------------------------------- stages

note() { # note NUMBER_STAGE COMMAND...: for the report
  local file=$RUN_DIR/commands/$1.txt
  shift
  mkdir -p "$RUN_DIR/commands"
  printf '%s\n' "$*" >"$file"
}
stamp() { # stamp STAGE [NETWORK=STAGE ...]: names what the stage is made of
  local start
  {
    cat "configs/toy/$1.yaml"
    printf '%s\n' "$@" ${overrides[@]+"${overrides[@]}"}
    for start in "${@:2}"; do cat "$RUN_DIR/${start#*=}/.begun"; done
  } | cksum
}
train() { # train NUMBER STAGE RANKS [NETWORK=STAGE ...]: the named networks start from these stages
  local number=$1 stage=$2 ranks=$3 made_of start
  shift 3
  local run=$RUN_DIR/$stage
  made_of=$(stamp "$stage" "$@")
  if [[ -f $run/.begun && $(<"$run/.begun") != "$made_of" ]]; then
    die "configs/toy/$stage.yaml, an override, or a run that it starts from, has changed since $run was begun:" \
      "remove that folder, or choose another with RUN_DIR=..."
  fi
  [[ -f $run/.done ]] && return
  local arguments=(--standalone --nproc_per_node "$ranks" train.py --config_path "configs/toy/$stage.yaml"
    --logdir "$run" --resume auto "training.micro_batch_size=$((GLOBAL_BATCH / ranks))"
    "parallel.replicate=$ranks" parallel.shard=1) # networks this small are not worth gathering
  for start in "$@"; do arguments+=("${start%%=*}.init=$RUN_DIR/${start#*=}"); done
  arguments+=(${overrides[@]+"${overrides[@]}"})
  mkdir -p "$run"
  printf '%s\n' "$made_of" >"$run/.begun"
  note "${number}_$stage" OMP_NUM_THREADS=1 torchrun "${arguments[@]}"
  "$PYTHON" -m torch.distributed.run "${arguments[@]}" || return
  touch "$run/.done"
}
logged() { # logged FILE COMMAND...: what it prints goes to the file, and to the screen if it fails
  local file=$1 code=0
  shift
  "$@" >"$file" 2>&1 || code=$?
  ((code == 0)) || tail -n 20 "$file" >&2
  return "$code"
}

mkdir -p "$RUN_DIR"
if command -v flock >/dev/null; then
  exec 9>"$RUN_DIR/.lock"
  flock -n 9 || die "another quickstart is at work in $RUN_DIR: wait for it or end it"
fi

[[ $NATIVE_BF16 ]] || say "these cores have no bf16 arithmetic: training in fp32, which takes longer"

say "1/6 teacher: bidirectional, many steps"
launch train 1 teacher "$RANKS"
finish $! teacher

say "2/6 causal initialisation by diffusion forcing"
launch train 2 causal_init "$RANKS" student=teacher
finish $! causal_init

distil=(student=causal_init teacher=teacher critic=teacher)
if ((RANKS > 1)); then
  say "3/6 and 4/6 Self-Forcing + DMD to 4 and to 2 steps, side by side (the latter writes $RUN_DIR/2step.log)"
  launch train 3 self_forcing_dmd 1 "${distil[@]}"
  four=$!
  launch logged "$RUN_DIR/2step.log" train 4 self_forcing_dmd_2step 1 "${distil[@]}"
  finish $! self_forcing_dmd_2step
  # two steps are done sooner than four: the idle core begins with what the report will need
  launch logged "$RUN_DIR/sampling.log" "$PYTHON" -m scripts.report --root "$RUN_DIR" --count "$COUNT" \
    --workers 1 --sample teacher causal_init self_forcing_dmd_2step
  ahead=$!
  finish "$four" self_forcing_dmd
  end "$ahead" 2>/dev/null
else
  say "3/6 Self-Forcing + DMD to 4 steps"
  launch train 3 self_forcing_dmd 1 "${distil[@]}"
  finish $! self_forcing_dmd
  say "4/6 Self-Forcing + DMD to 2 steps"
  launch train 4 self_forcing_dmd_2step 1 "${distil[@]}"
  finish $! self_forcing_dmd_2step
fi

say "5/6 videos of the distilled student"
inference=(bash inference.sh --run "$RUN_DIR/self_forcing_dmd" --prompts configs/toy/prompts.txt --out "$RUN_DIR/videos")
note 5_videos "${inference[@]}"
launch "${inference[@]}"
finish $! videos

say "6/6 evaluation and report"
report=(-m scripts.report --root "$RUN_DIR" --count "$COUNT")
note 6_report python "${report[@]}"
launch "$PYTHON" "${report[@]}" --workers "$RANKS"
finish $! report
say "done"
