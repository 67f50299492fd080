#!/usr/bin/env bash
# Trains on all workers of a TPU VM pod, restarting after a failure; every
# restart resumes. A log a worker is in LOGS on that worker.
#   TPU=name ZONE=us-east5-b launch/tpu_pod.sh --config=... --workdir=/mnt/...
# The repository must lie at REPO on every worker. DRY_RUN=1 prints the command.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}"
REPO="${REPO:-vjepa_jax}"
LOGS="${LOGS:-logs}"
RETRIES="${RETRIES:-10}"
printf -v flags '%q ' "$@"

read -r -d '' remote <<REMOTE || true
cd $REPO && mkdir -p $LOGS && source launch/environment.sh tpu &&
for attempt in \$(seq $RETRIES); do
  python main.py --coordinator=auto $flags 2>&1 |
    tee -a $LOGS/\$(hostname).log
  [ \${PIPESTATUS[0]} = 0 ] && exit 0
  echo "attempt \$attempt failed, restarting" >&2; sleep 30
done; exit 1
REMOTE

command=(gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all
  --command="$remote")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
