#!/usr/bin/env bash
# Compares with the reference systems: installs torch and transformers into
# .venv, runs the parity tests, prints their table, and writes parity.json and
# docs/parity.md. Extra flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh parity
# V-JEPA 1's own modules, as an oracle; its licence is non-commercial. Without
# it their tests are skipped.
python -m pip install --quiet --no-deps vjepa==0.1.2 ||
  echo 'vjepa is not to be had, its tests are skipped' >&2
rm -f parity.json
PARITY_JSON="$PWD/parity.json" python -m pytest tests/interop "$@"
python tests/interop/make_page.py parity.json docs/parity.md
