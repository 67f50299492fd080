#!/usr/bin/env bash
# Trains on one or several TPU slices of a GKE cluster, through xpk:
#   pip install xpk
#   export CLUSTER=name PROJECT=id ZONE=us-east5-b TPU_TYPE=v6e-256 SLICES=4
#   launch/gke_multislice.sh NAME --config=... --workdir=gs://bucket/run
# Workdir and data must be in a bucket, or in a STORAGE that xpk knows. The
# image is IMAGE, with the repository in its working directory and '.[tpu,gcs]'
# installed; without it xpk copies this folder, best a fresh clone, into BASE.
# main.py's exit codes decide: the workload restarts, RETRIES times, unless it
# is done or made a mistake (2). DRY_RUN=1 prints the command.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CLUSTER:?name of the cluster}" "${PROJECT:?its project}" \
  "${ZONE:?its zone}" "${TPU_TYPE:?such as v6e-256}"
name="${1:?name of the workload}"
shift

# exec: xpk sends SIGTERM to the process it has started, which must be python.
printf -v run '%q ' exec python main.py --coordinator=auto "$@"
if [ -n "${IMAGE:-}" ]; then
  image=(--docker-image="$IMAGE")
else
  image=(--base-docker-image="${BASE:-python:3.12}" --script-dir="$PWD")
  run="pip install --quiet --editable .[tpu,gcs] && $run"
fi
# 127 and up, signals among them, are restarted by xpk itself.
command=(xpk workload create --workload="$name" --cluster="$CLUSTER"
  --project="$PROJECT" --zone="$ZONE" --tpu-type="$TPU_TYPE"
  --num-slices="${SLICES:-1}" "${image[@]}" ${STORAGE:+--storage="$STORAGE"}
  --max-restarts="${RETRIES:-100}" '--restart-on-exit-codes=1,75'
  --termination-grace-period-seconds=300 --command="$run")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
