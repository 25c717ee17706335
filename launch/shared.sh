# shellcheck shell=bash
# What the launchers share; to be sourced.

# Whether a command that ended with this exit code is worth running again: it was stopped (75), another process was
# gone (76), or something killed it. Not after Ctrl-C (130), and not after an error, which would come again.
again() { [[ $1 == 75 || $1 == 76 ]] || (($1 > 128 && $1 != 130)); }

# Whether a process with this exit code was killed, or was aborted by JAX (134) because another one of its run is gone
# or does not answer. SIGTERM (143) and Ctrl-C (130) end a process as they should.
is_gone() { (($1 > 128 && $1 != 130 && $1 != 143)); }

# Gives back the exit code of a process, or 76 and a sentence if it is gone.
settle() {
    is_gone "$1" || return "$1"
    echo "error: a process of the run is gone (exit code $1); run the same command again to resume from the last checkpoint." >&2
    return 76
}

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
