# shellcheck shell=bash
# What the launchers share; to be sourced.

# Whether a command that ended with this exit code is worth running again: it was stopped (75), another process was
# gone (76), or something killed it. Not after Ctrl-C (130), and not after an error, which would come again.
again() { [[ $1 == 75 || $1 == 76 ]] || (($1 > 128 && $1 != 130)); }

fail() {
    echo "error: $1" >&2
    exit 2
}

# Runs a command, or with --dry-run says it, as it could be typed.
step() {
    if [[ ${dry_run:-} ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
