#!/usr/bin/env bash
# Videos from a run: bash inference.sh [any option of inference.py]
#   RUN=logs/toy/self_forcing_dmd  which run    PROMPTS=configs/toy/prompts.txt  what to make    OUT=logs/videos  where
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
RUN=${RUN:-$root/logs/toy/self_forcing_dmd}
PROMPTS=${PROMPTS:-$root/configs/toy/prompts.txt}
OUT=${OUT:-$root/logs/videos}
arguments=("$@")
has() { local a; for a in "${arguments[@]}"; do [[ $a == "$1" || $a == "$1="* ]] && return; done; return 1; }
has --run || has --checkpoint || has --model || arguments+=(--run "$RUN")
has --prompt || has --prompts || arguments+=(--prompts "$PROMPTS")
has --out || arguments+=(--out "$OUT")
exec "$PYTHON" "$root/inference.py" "${arguments[@]}"
