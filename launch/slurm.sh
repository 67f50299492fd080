#!/usr/bin/env bash
#SBATCH --job-name=vjepa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log
# One task a GPU; sbatch flags override the lines above:
#   sbatch --nodes=16 launch/slurm.sh --config=... --workdir=/shared/run
# The job is told two minutes before its time is up, saves, and is requeued.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
command=(srun .venv/bin/python main.py --coordinator=auto "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
code=0
"${command[@]}" || code=$?
# 75: saved and left because of the signal.
[ "$code" = 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
