#!/usr/bin/env bash
# Videos from a run: bash inference.sh [any option of inference.py]
#   RUN=logs/toy/self_forcing_dmd  which run    PROMPTS=configs/toy/prompts.txt  what to make    OUT=logs/videos  where
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
RUN=${RUN:-logs/toy/self_forcing_dmd}
PROMPTS=${PROMPTS:-configs/toy/prompts.txt}
OUT=${OUT:-logs/videos}
arguments=("$@")
has() { local a; for a in "${arguments[@]}"; do [[ $a == "$1" || $a == "$1="* ]] && return; done; return 1; }
has --run || has --checkpoint || arguments+=(--run "$RUN")
has --prompt || has --prompts || arguments+=(--prompts "$PROMPTS")
has --out || arguments+=(--out "$OUT")
exec "$PYTHON" inference.py "${arguments[@]}"
