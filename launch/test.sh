#!/usr/bin/env bash
# Installs into .venv, then lints and tests; extra flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test
ruff check .
exec python -m pytest "$@"
