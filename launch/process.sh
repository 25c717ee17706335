#!/usr/bin/env bash
# Starts one process of a run, as launch/gke.sh does in each pod:
#
#     launch/process.sh -- command...
#
# JAX aborts a process with a page of C++ when another process of its run is gone. This script adds a sentence that says
# so, and ends with 76. SIGTERM and Ctrl-C reach the command.
set -euo pipefail
# shellcheck source=launch/shared.sh
. "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

[[ ${1:-} == -- ]] && shift
(($#)) || fail "there is no command after --"

set -m # else the command would not listen to Ctrl-C: a shell makes what runs in its background deaf to it
# A signal may come before there is a process to pass it on to.
asked='' pid=''
forward() {
    asked=$1
    [[ ! $pid ]] || kill "-$1" "$pid" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT
"$@" &
pid=$!
[[ ! $asked ]] || forward "$asked"
# A trap ends a wait, too: only the one after the command's end has its exit code.
code=0
wait "$pid" 2>/dev/null || code=$?
while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" 2>/dev/null || code=$?
done
settle "$code" || exit "$?"
