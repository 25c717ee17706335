#!/usr/bin/env bash
# Starts N processes of one run on this machine, over loopback:
#
#     launch/local.sh N [--devices=K] [--dry-run] -- command...
#
# --devices=K gives each process K simulated CPU devices; without it a process has the devices that JAX finds. Each
# line of output starts with the number of its process. SIGTERM and Ctrl-C reach all processes. If a process fails, or
# it or this script is killed, the other processes get a SIGTERM, because they may still be waiting for it to join; ten
# seconds later they are killed. The exit code is that of a command that failed by itself; else 76 if a process is gone;
# else 75 if one was stopped, or 143 if it was stopped before it could save.
set -euo pipefail
# shellcheck source=launch/shared.sh
. "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

usage() { fail "$1; usage: launch/local.sh N [--devices=K] [--dry-run] -- command..."; }

processes='' devices='' dry_run=''
while (($#)); do
    case $1 in
    --) shift && break ;;
    --devices=*) devices=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    -*) usage "unknown flag $1" ;;
    *)
        [[ ! $processes ]] || usage "the number of processes is given twice, as $processes and as $1"
        processes=$1
        ;;
    esac
    shift
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || usage "N='$processes' must be a whole number from 1"
[[ $devices =~ ^([1-9][0-9]*)?$ ]] || usage "--devices='$devices' must be a whole number from 1"
(($#)) || usage "there is no command after --"

# A signal is passed on when all processes are there to hear it.
asked='' interrupted=''
trap 'asked=TERM' TERM
trap 'asked=INT interrupted=1' INT
free_port() {
    trap '' INT # its traceback would tell nothing
    python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}
port=${dry_run:+PORT}
variables=("JAX_COORDINATOR_ADDRESS=localhost:${port:-$(free_port)}" "JAX_NUM_PROCESSES=$processes")
[[ $devices ]] && variables+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")

if [[ $dry_run ]]; then
    for ((i = 0; i < processes; i++)); do
        printf '%q ' env "${variables[@]}" "JAX_PROCESS_ID=$i" "$@"
        echo
    done
    exit
fi

pids=() readers=()
# Ends what this script leaves behind when it is killed: it hears of each process, and then nothing more. A process
# leads its group, so that what it has started itself ends with it.
guard() {
    local pid groups=() i
    trap '' INT TERM HUP
    while read -r pid; do
        [[ $pid != end ]] || exit 0
        groups+=("-$pid")
    done
    kill -TERM -- "${groups[@]}"
    for ((i = 0; i < 100; i++)); do # ten seconds to save
        sleep 0.1
        kill -0 -- "${groups[@]}" || break
    done
    kill -KILL -- "${groups[@]}"
}
set -m # else Python would not listen to Ctrl-C: a shell makes what runs in its background deaf to it
# shellcheck disable=SC2329  # the traps call it
forward() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
# In a group of its own, too, and with nothing of this script's that somebody waits to see closed.
coproc GUARD { guard > /dev/null 2>&1; }
tell=${GUARD[1]}
for ((i = 0; i < processes; i++)); do
    # The readers outlive the signals, and end when what they read ends.
    exec {output}> >(trap '' INT TERM && exec sed -u "s/^/[$i] /")
    readers+=($!)
    exec {errors}> >(trap '' INT TERM && exec sed -u "s/^/[$i] /" >&2)
    readers+=($!)
    # shellcheck disable=SC2261  # stdout has a descriptor, stderr another
    env "${variables[@]}" "JAX_PROCESS_ID=$i" "$@" >&"$output" 2>&"$errors" &
    pids+=($!)
    exec {output}>&- {errors}>&-
    echo "$!" >&"$tell"
done

# How bad an exit code is: 0 done, 1 stopped, 2 gone or left alone, 3 the cause.
badness() {
    case $1 in 0) echo 0 ;; 75 | 143) echo 1 ;; 76) echo 2 ;; *) is_gone "$1" && echo 2 || echo 3 ;; esac
}
worst=0 told=''
while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
        kill -0 "${pids[i]}" && continue
        code=0
        wait "${pids[i]}" || code=$?
        unset "pids[i]"
        (($(badness "$code") > $(badness "$worst"))) && worst=$code
    done
    if [[ ! $told ]] && (($(badness "$worst") > 1)); then
        told=$SECONDS
        forward TERM
    fi
    if [[ $asked ]]; then
        forward "$asked"
        asked=''
    fi
    # Without the one that is gone, no other can complete a checkpoint; a process that was stopped hears nothing.
    [[ ! $told ]] || ((SECONDS - told < 10)) || forward KILL
    sleep 0.2 &
    wait "$!" || true # unlike a program in the foreground, it lets a signal to this script through at once
done 2>/dev/null # the shell's own remarks about a process that was killed
echo end >&"$tell"
# What the processes said stands before the last sentence, unless something that they started still holds their output.
for ((i = 0; i < 50; i++)); do
    kill -0 "${readers[@]}" 2>/dev/null || break
    sleep 0.1
done
# Some processes may have heard Ctrl-C so early that Python itself has failed, and not ended as it should.
if [[ $interrupted && $worst != 0 && $worst != 75 ]]; then exit 130; fi
settle "$worst" || exit "$?"
