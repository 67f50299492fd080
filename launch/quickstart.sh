#!/usr/bin/env bash
# Installs into .venv and runs the quickstart; extra flags go to main.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh ""
exec python main.py --config=configs/quickstart.py --workdir=runs/quickstart "$@"
