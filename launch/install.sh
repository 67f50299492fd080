#!/usr/bin/env bash
# Installs into .venv what fits this machine, and says what it found: a TPU, an
# NVIDIA GPU or neither. DRY_RUN=1 only says it.
set -euo pipefail
cd "$(dirname "$0")/.."

has_tpu() {
  # Google's devices but for its network card, gVNIC.
  local folder
  for folder in "${PCI:-/sys/bus/pci/devices}"/*; do
    [ "$(cat "$folder/vendor" 2>/dev/null)" = 0x1ae0 ] &&
      [ "$(cat "$folder/device")" != 0x0042 ] && return
  done
  return 1
}

if has_tpu; then
  found='a TPU' extra=tpu
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  found="$(nvidia-smi -L | head -n 1)" extra=cuda
else
  found='no accelerator' extra=
fi
echo "found $found: installing '.${extra:+[$extra]}'"
[ -z "${DRY_RUN:-}" ] || exit 0
# shellcheck source=launch/environment.sh
source launch/environment.sh "$extra"
python -c 'import jax; print("jax", jax.__version__, "runs on", *jax.devices())'
