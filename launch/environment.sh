# shellcheck shell=bash
# Makes .venv with the extra given as $1 (or none) and puts it on the PATH.
# Sourced by the scripts beside it, which run at the top of the repository.
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "vjepa_jax needs Python 3.11 or newer, $PYTHON is $("$PYTHON" --version);" \
    "set PYTHON=/path/to/python3.11" >&2
  exit 1
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"
python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
