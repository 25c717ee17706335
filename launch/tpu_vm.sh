#!/usr/bin/env bash
# A run on a Cloud TPU slice, or on several, from your own machine, by gcloud:
#
#     launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE --type=TYPE --runtime=VERSION [--slices=N] [--project=ID]
#                      [--spot] [--dry-run] [-- command...]
#
#     create    asks for the slice, or for N of its type, NAME-0, NAME-1 ..., and waits until all are there
#     install   copies this commit to all its machines, and installs it
#     run       starts the command on all of them; it goes on when this connection ends, and after exit code
#               75 or 76, or a kill
#     logs      follows what the first machine prints
#     stop      SIGTERM to all: the run saves and ends
#     delete    gives back what create asked for
#     keep      all of it: create, install, run; run again on machines that were replaced, all of it again if a slice
#               is taken away, until the command is done
#
# Each action can be given again, with the same --slices: what is there already is left as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/shared.sh

action=${1:-}
(($#)) && shift
name='' zone='' type='' runtime='' slices=1 project='' spot='' dry_run=''
while (($#)); do
    case $1 in
    --) shift && break ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    *) fail "unknown flag $1; the flags are listed at the top of launch/tpu_vm.sh" ;;
    esac
    shift
done
command=("$@")
where=("--zone=$zone" ${project:+"--project=$project"})

tpus() { step gcloud compute tpus "$@" "${where[@]}"; }

# The rest goes on if a slice cannot be reached.
everywhere() {
    local node code=0
    for node in "${nodes[@]}"; do
        tpus tpu-vm ssh "$node" --worker=all --command="$1" || code=$?
    done
    return "$code"
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED (taken away) ..., NONE if nothing was asked for, and UNKNOWN where gcloud
# says something else, which is no reason to ask again or to give anything back.
state() {
    local ask=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)') said
    if "${ask[@]}" 2>/dev/null; then return; fi
    said=$("${ask[@]}" 2>&1 > /dev/null || true)
    if [[ $said == *NOT_FOUND* ]]; then
        echo NONE
    else
        echo "$said" >&2
        echo UNKNOWN
    fi
}

request() {
    [[ $type && $runtime ]] || fail "$action needs --type (such as v5litepod-16) and --runtime (such as v2-alpha-tpuv5-lite)"
    # With a count Google tells the machines of the other slices (MEGASCALE_...), which JAX reads.
    local asked=("--node-id=$name")
    ((slices == 1)) || asked=("--node-count=$slices" "--node-prefix=$name")
    tpus queued-resources create "$name" "${asked[@]}" "--accelerator-type=$type" \
        "--runtime-version=$runtime" ${spot:+--spot} || fail "gcloud did not accept the request for a slice; see its message above"
}

# The state, to begin with: a mistake in the flags, or no log-in, is said at once.
first_state() {
    local now
    now=$(state)
    [[ $now != UNKNOWN ]] || fail "gcloud does not say whether $name exists; see its message above"
    echo "$now"
}

create() {
    if [[ $dry_run ]]; then
        request
        return
    fi
    local now
    now=$(first_state)
    [[ $now != NONE ]] || request
    until [[ $now == ACTIVE ]]; do
        [[ $now =~ FAILED|SUSPEND ]] && fail "the slice was not created; see gcloud compute tpus queued-resources \
describe $name, give it back by launch/tpu_vm.sh delete, and ask again"
        sleep 30
        now=$(state)
    done
}

install() {
    # Named after the slice: another one may be installed at the same time.
    archive=${TMPDIR:-/tmp}/$name.tar.gz
    step git archive "--output=$archive" HEAD || fail "this folder is not a clone of the repository; run the command in one"
    local node
    for node in "${nodes[@]}"; do
        tpus tpu-vm scp "$archive" "$node:lit_jax.tar.gz" --worker=all || return 1
    done
    # With huge pages the TPU runtime starts and ends faster; JAX warns where they are off. The images of TPU machines
    # have an older Python than lit_jax needs; uv brings its own.
    everywhere '{ sudo sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled" || true; } &&
mkdir -p lit_jax && tar -xzf lit_jax.tar.gz -C lit_jax && cd lit_jax &&
python3 -m pip install --quiet --user uv && { [ -d .venv ] || python3 -m uv venv --quiet --python=3.11 .venv; } &&
python3 -m uv pip install --quiet --python=.venv/bin/python -c requirements.lock -r requirements-tpu.txt'
}

run() {
    ((${#command[@]})) || fail "there is no command after --"
    # The lock: a second start beside a first that still runs is none; to look whether one does takes it for a moment.
    # The command finds lit_jax's own python first.
    everywhere "cd lit_jax && export PATH=\$PWD/.venv/bin:\$PATH && { flock -n ../run.lock rm -f ../run.exit || true; } && \
(setsid flock -w 10 ../run.lock bash -c \
'[ -e ../run.exit ] || { launch/restart.sh -- \"\$@\" >> ../run.log 2>&1; echo \$? > ../run.exit; }' - \
$(printf '%q ' "${command[@]}")< /dev/null > /dev/null 2>&1 &)"
}

logs() { tpus tpu-vm ssh "${nodes[0]}" --worker=0 --command='tail -n 100 -F run.log'; }

# The loop first, or it would start the command again. Its shell ends with it, and can leave no exit code itself.
stop() {
    everywhere 'pkill -f launch/restart.s[h] && echo 143 > run.exit; pkill -TERM -f "python.* -m lit_jax[.]" || true'
}

delete() { tpus queued-resources delete "$name" --force --quiet; }

# The exit code that the command left on the first machine; nothing as long as it runs.
left() {
    tpus tpu-vm ssh "${nodes[0]}" --worker=0 --command='flock -n run.lock cat run.exit' 2>/dev/null || true
}

# Whether the command neither runs nor has ended on some machine: a lost slice of several is replaced by a new one,
# and the machines of the others are restarted.
missing() {
    local said
    said=$(everywhere "flock -n run.lock sh -c '[ -e run.exit ] || echo missing'" 2>/dev/null || true)
    [[ $said == *missing* ]]
}

start() {
    until install && run; do
        [[ $(state) =~ ACTIVE|UNKNOWN ]] || return 0
        echo "Some machines could not be reached or installed; see above. Trying again." >&2
        sleep 30
    done
}

keep() {
    ((${#command[@]})) || fail "there is no command after --"
    if [[ $dry_run ]]; then
        create && install && run
        return
    fi
    first_state > /dev/null
    local started='' code=''
    while true; do
        case $(state) in
        NONE) request ;;
        ACTIVE)
            [[ $started ]] && code=$(left)
            if [[ $code ]]; then
                echo "The command ended with exit code $code. To give the slice back, run launch/tpu_vm.sh delete." >&2
                exit "$code"
            fi
            if [[ ! $started ]] || missing; then start; fi
            started=1
            ;;
        *FAILED* | *SUSPEND*)
            echo "A slice is gone; requesting new ones." >&2
            delete || true
            ;;
        esac
        sleep 60
    done
}

case $action in
create | install | run | logs | stop | delete | keep) ;;
*) fail "'$action' is not an action; write one of create, install, run, logs, stop, delete, keep" ;;
esac
[[ $name && $zone ]] || fail "$action needs --name and --zone"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices='$slices' must be a whole number from 1"
nodes=("$name") # Cloud TPU's word for a slice
if ((slices > 1)); then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
"$action"
