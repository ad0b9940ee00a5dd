#!/usr/bin/env bash
# Runs one dsjax command in N processes on this machine; on CPU, gloo carries what they say to each other.
#   DEVICES=4 ./scripts/launch_local.sh 2 generate --model DIR --mesh ep=4,tp=2 --prompt "Why?" ...
# Variables:
#   DEVICES=4      devices that each process has (CPU only; default 1)
#   PLATFORM=cuda  instead of cpu. Give each process its own cards by CARDS="0,1 2,3", a word for each process.
#   PORT=12345     where process 0 listens (default: a free one)
#   PYTHON=...     a Python that has dsjax (default: the environment of the other scripts)
# The exit status is that of the first process that fails, else 0. If one fails the others end by themselves; what is
# left after 30 s is killed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
    echo "usage: launch_local.sh N VERB [FLAGS...]" >&2
    exit 2
fi
count=$1
shift
if [ -z "${PYTHON:-}" ]; then
    ensure_environment ""
    PYTHON="$VENV/bin/python"
fi
free='import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
port="${PORT:-$("$PYTHON" -c "$free")}"
export JAX_NUM_CPU_DEVICES="${DEVICES:-1}"
read -ra cards <<<"${CARDS:-}"

running=()
stop() { kill -"$1" "${running[@]}" 2>/dev/null || true; }
trap 'stop TERM; exit 143' TERM
trap 'stop TERM; exit 130' INT # a shell's background processes do not hear Ctrl-C themselves
for ((i = 0; i < count; i++)); do
    if [ -n "${cards[$i]:-}" ]; then export CUDA_VISIBLE_DEVICES="${cards[$i]}"; fi
    "$PYTHON" -m dsjax "$1" --platform "${PLATFORM:-cpu}" "${@:2}" \
        --coordinator "127.0.0.1:$port" --processes "$count" --process-id "$i" &
    running+=($!)
done

status=0
for ((i = 0; i < count; i++)); do
    wait -n && continue
    status=$?
    break
done
if [ "$status" != 0 ]; then
    for ((tenth = 0; tenth < 300; tenth++)); do
        kill -0 "${running[@]}" 2>/dev/null || break # true while one of them is there
        sleep 0.1
    done
    stop KILL
fi
exit "$status"
