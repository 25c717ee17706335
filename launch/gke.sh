#!/usr/bin/env bash
# Starts a run on Google Kubernetes Engine, as a JobSet (https://jobset.sigs.k8s.io, which the cluster must have):
#
#     launch/gke.sh --name=NAME --image=IMAGE --claim=VOLUME_CLAIM --accelerator=LABEL --nodes=N --chips=CHIPS_OF_A_NODE
#                   [--topology=4x4] [--slices=N] [--spot] [--dry-run] -- command...
#
# With --topology the accelerator is a TPU (tpu-v5-lite-podslice), else a GPU (nvidia-h100-80gb). With --slices the
# run has N slices of that topology, and --nodes counts the nodes of one slice. The claim is mounted as /runs in all
# pods. If a pod is stopped or left alone, all pods start again; after an error no pod does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/shared.sh

name='' image='' claim='' accelerator='' nodes='' chips='' topology='' slices=1 spot='' dry_run=''
while (($#)); do
    case $1 in
    --) shift && break ;;
    --name=* | --image=* | --claim=* | --accelerator=* | --nodes=* | --chips=* | --topology=* | --slices=*)
        key=${1%%=*}
        printf -v "${key#--}" '%s' "${1#*=}"
        ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    *) fail "unknown flag $1; the flags are listed at the top of launch/gke.sh" ;;
    esac
    shift
done
for key in name image claim accelerator nodes chips; do
    [[ ${!key} ]] || fail "--$key is missing"
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name='$name' must begin with a letter and have only a-z, 0-9 and -"
for key in nodes chips slices; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || fail "--$key='${!key}' must be a whole number from 1"
done
if [[ $topology ]]; then
    [[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "--topology='$topology' must look like 4x4 or 4x4x4"
elif [[ $accelerator == tpu* ]]; then
    fail "$accelerator is a TPU; also give its --topology"
fi
if ((slices > 1)); then
    [[ $topology ]] || fail "--slices=$slices is only for TPUs; also give their --topology"
    [[ $nodes != 1 ]] || fail "GKE cannot join slices of a single node (--nodes=1); give a larger --topology, and its --nodes"
fi
(($#)) || fail "there is no command after --"

placement=''
if [[ $topology ]]; then
    resource=google.com/tpu label=cloud.google.com/gke-tpu-accelerator
    # GKE itself tells the processes on TPUs of each other, and which slice is theirs.
    environment=''
    # A slice of several nodes is a node pool; of two with the same topology, both would get some of its pods.
    [[ $nodes == 1 ]] || placement="
  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}"
else
    resource=nvidia.com/gpu label=cloud.google.com/gke-accelerator
    environment="
              env:
              - {name: JAX_COORDINATOR_ADDRESS, value: '$name-workers-0-0.$name:8476'}
              - {name: JAX_NUM_PROCESSES, value: '$nodes'}
              - name: JAX_PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']"
fi
# Kubernetes makes $ of $$, and reads $(NAME) as a variable.
arguments=$(python3 -c 'import json, sys; print(json.dumps([word.replace("$", "$$") for word in sys.argv[1:]]))' \
    launch/process.sh -- "$@")

manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: '$name'$placement
spec:
  failurePolicy:
    maxRestarts: 1000
    rules:
    - {action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
  - name: workers
    replicas: $slices
    template:
      spec:
        parallelism: $nodes
        completions: $nodes
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: lit-jax, operator: In, values: [1, 2]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              $label: $accelerator${topology:+
              cloud.google.com/gke-tpu-topology: $topology}${spot:+
              cloud.google.com/gke-spot: 'true'}
            containers:
            - name: lit-jax
              image: $image
              command: $arguments$environment
              resources: {limits: {$resource: $chips}}
              volumeMounts: [{name: runs, mountPath: /runs}, {name: shm, mountPath: /dev/shm}]
            volumes:
            # Batches come from the data's worker processes through it; 64 MiB by default.
            - {name: shm, emptyDir: {medium: Memory}}
            - name: runs
              persistentVolumeClaim: {claimName: $claim}"

if [[ $dry_run ]]; then
    echo "# kubectl apply --filename=-"
    echo "$manifest"
else
    kubectl apply --filename=- <<<"$manifest"
fi
