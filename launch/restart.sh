#!/usr/bin/env bash
# Runs a command again as long as it asks for that by its exit code (see shared.sh): it was stopped, killed, or left
# alone by another process of its run.
#
#     launch/restart.sh [--dry-run] -- command...
set -euo pipefail
# shellcheck source=launch/shared.sh
. "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

dry_run=''
while (($#)); do
    case $1 in
    --) shift && break ;;
    --dry-run) dry_run=1 ;;
    *) fail "unknown flag $1; usage: launch/restart.sh [--dry-run] -- command..." ;;
    esac
    shift
done
(($#)) || fail "there is no command after --"

while true; do
    code=0
    step "$@" || code=$?
    settle "$code" || code=$?
    again "$code" || exit "$code"
    echo "The exit code is $code; running the same command again in ${PAUSE:-10} s." >&2
    sleep "${PAUSE:-10}" # the other processes of the run need a moment to end, too
done
