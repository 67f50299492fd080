#!/usr/bin/env bash
# Installs into .venv, then lints and tests; extra flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test
ruff check .
# Two processes, a file in one of them: most of a test is compilation, by one
# core.
exec python -m pytest --numprocesses=2 --dist=loadfile "$@"
