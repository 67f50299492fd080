#!/usr/bin/env bash
#SBATCH --job-name=vjepa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log
# One task a GPU; sbatch flags override the lines above. The folder logs must
# exist, and .venv, which launch/install.sh makes (on a node with a GPU), or
# another python that has the package: RUN_PYTHON.
#   sbatch --nodes=16 launch/slurm.sh --config=... --workdir=/shared/run
# The job is told two minutes before its time is up, saves, and is requeued. It
# is requeued after a failure too, RETRIES times, but not after a mistake.
set -euo pipefail
RETRIES="${RETRIES:-10}"
cd "${SLURM_SUBMIT_DIR:-.}"
# Each task sees all GPUs of its node, and jax takes the one of its number. A
# task that fails ends the others, one that hangs among them; tasks that save and
# leave wait for each other before they end. srun does not take over the cores
# that sbatch gave a task; config.data.num_workers decoding processes of each
# task share them.
command=(srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
  --gpu-bind=none --kill-on-bad-exit=1 --label
  "${RUN_PYTHON:-.venv/bin/python}" main.py --coordinator=auto "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
code=0
"${command[@]}" || code=$?
failures="logs/$SLURM_JOB_ID.failures"
case "$code" in
  0 | 2) exit "$code" ;;
  75) echo 'slurm.sh: saved and left, requeued' ;;
  *)
    echo "code $code" >> "$failures"
    count="$(wc -l < "$failures")"
    if [ "$count" -gt "$RETRIES" ]; then
      echo "slurm.sh: failed with code $code after $RETRIES restarts" >&2
      exit "$code"
    fi
    echo "slurm.sh: failed with code $code, restart $count of $RETRIES" >&2
    ;;
esac
scontrol requeue "$SLURM_JOB_ID"
exit "$code"
