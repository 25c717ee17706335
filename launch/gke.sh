#!/usr/bin/env bash
# A run on Google Kubernetes Engine, as a JobSet (https://jobset.sigs.k8s.io, to be installed in the cluster):
#
#     launch/gke.sh --name=NAME --image=IMAGE --claim=VOLUME_CLAIM --accelerator=LABEL --nodes=N --chips=CHIPS_OF_A_NODE
#                   [--topology=4x4] [--slices=N] [--spot] [--dry-run] -- command...
#
# With --topology the accelerator is a TPU (tpu-v5-lite-podslice), else a GPU (nvidia-h100-80gb). With --slices the
# run has N slices of that topology, and --nodes are those of one. The claim is mounted as /runs in all pods. A pod
# that is stopped or left alone starts all of them again; after an error none is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/again.sh

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
    *) fail "unknown flag $1; launch/gke.sh says at its top which there are" ;;
    esac
    shift
done
for key in name image claim accelerator nodes chips; do
    [[ ${!key} ]] || fail "--$key is missing"
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices='$slices' is no number of slices"
if ((slices > 1)); then
    [[ $topology ]] || fail "--slices are of TPUs; give their --topology, too"
    [[ $nodes != 1 ]] || fail "GKE joins no slices of a single node; give a larger --topology, and its --nodes"
fi
(($#)) || fail "there is no command behind --"

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
arguments=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")

manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$placement
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
              volumeMounts: [{name: runs, mountPath: /runs}]
            volumes:
            - name: runs
              persistentVolumeClaim: {claimName: $claim}"

if [[ $dry_run ]]; then
    echo "# kubectl apply --filename=-"
    echo "$manifest"
else
    kubectl apply --filename=- <<<"$manifest"
fi
