# shellcheck shell=bash
# Makes .venv with the extra given as $1 (or none) and puts it on the PATH; one
# that is half made, or too old, is made again, but not one that has no pip and
# yet the package (uv makes such). Sourced by the scripts beside it, which run at
# the top of the repository. PYTHON is what makes it, by default the
# first that is new enough; with INSTALL_PYTHON=1 apt brings one if none is.
is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}
if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3.14 python3.13 python3.12 python3.11 python3; do
    is_new_enough "$PYTHON" && break
  done
fi
if ! is_new_enough "$PYTHON" && [ -n "${INSTALL_PYTHON:-}" ]; then
  # A machine that has just started may be busy with its own upgrades.
  sudo add-apt-repository --yes ppa:deadsnakes/ppa &&
    sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet \
      python3.11 python3.11-venv && PYTHON=python3.11
fi
if ! is_new_enough "$PYTHON"; then
  echo "vjepa_jax needs Python 3.11 or newer, $PYTHON is" \
    "$("$PYTHON" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
  exit 1
fi
has_pip() {
  { .venv/bin/python -m pip --version || .venv/bin/python -m ensurepip; } \
    >/dev/null 2>&1
}
# Isolated, or it would find the package in the working directory.
if ! is_new_enough .venv/bin/python || ! {
  has_pip || .venv/bin/python -I -c 'import vjepa_jax' 2>/dev/null
}; then
  "$PYTHON" -m venv --clear .venv
fi
export PATH="$PWD/.venv/bin:$PATH"
if has_pip; then
  python -m pip install --quiet --disable-pip-version-check \
    --editable ".${1:+[$1]}"
else
  echo ".venv has no pip and is taken as it is; '.${1:+[$1]}' should be in it" >&2
fi
