#!/usr/bin/env bash
# Runs on GPUs under Slurm. In a shell the script submits itself; as the job it starts one process for each GPU:
#
#     launch/slurm.sh --nodes=N --gpus=GPUS_OF_A_NODE [--time=HH:MM:SS] [--dry-run] -- command...
#
# Five minutes before its time is over, or when it is preempted, the run saves and ends with 75, and the job goes back
# into the queue. `sbatch` flags that are not here (account, partition) can be set by SBATCH_ACCOUNT and so on.
set -euo pipefail
submitted=''
if [[ ${1:-} == --submitted ]]; then # in the folder that it was submitted from, as a copy that lies elsewhere
    submitted=1
    shift
else
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
fi
. launch/shared.sh

nodes=1 gpus='' time=24:00:00 dry_run=''
while (($#)); do
    case $1 in
    --) shift && break ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    *) fail "unknown flag $1; the flags are listed at the top of launch/slurm.sh" ;;
    esac
    shift
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes='$nodes' must be a whole number from 1"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus='$gpus' must be the number of GPUs of each node"
(($#)) || fail "there is no command after --"

# Each process sees all GPUs of its node, and JAX takes the one with its own number: no --gpus-per-task here.
# A process that fails before it has met the others ends them after a minute; later they end by themselves.
run=(srun --label --wait=60 "$@")
if [[ ! $submitted ]]; then
    step sbatch --job-name=lit_jax "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
        "--time=$time" --signal=TERM@300 --requeue --open-mode=append --output=slurm-%j.log \
        launch/slurm.sh --submitted "--gpus=$gpus" -- "$@"
    [[ ! $dry_run ]] || step "${run[@]}"
    exit
fi

code=0
"${run[@]}" || code=$?
settle "$code" || code=$?
if again "$code"; then
    echo "The exit code is $code; the job goes back into the queue." >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
