#!/usr/bin/env bash
# Videos from a run: bash inference.sh [any option of inference.py]
#   RUN=logs/quickstart/self_forcing_dmd  which run    PROMPTS=configs/shapes/prompts.txt  what to make    OUT=logs/videos  where
#   NPROC=8  so many processes on this machine: each makes videos of its own, or see --sequence_parallel
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
RUN=${RUN:-$root/logs/quickstart/self_forcing_dmd}
PROMPTS=${PROMPTS:-$root/configs/shapes/prompts.txt}
OUT=${OUT:-$root/logs/videos}
arguments=("$@")
has() { local a; for a in "${arguments[@]}"; do [[ $a == "$1" || $a == "$1="* ]] && return; done; return 1; }
has --run || has --checkpoint || has --model || arguments+=(--run "$RUN")
has --prompt || has --prompts || arguments+=(--prompts "$PROMPTS")
has --out || arguments+=(--out "$OUT")
launch=("$PYTHON")
[ "${NPROC:-1}" = 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC" --) # else it takes --run for an option of its own
exec "${launch[@]}" "$root/inference.py" "${arguments[@]}"
