#!/usr/bin/env bash
# Trains on all workers of a TPU VM pod, and again after a failure; every
# restart resumes.
#   export TPU=name ZONE=us-east5-b
#   launch/tpu_pod.sh setup                             brings code and Python
#   launch/tpu_pod.sh --config=... --workdir=/mnt/...   starts and follows
#   launch/tpu_pod.sh logs                              follows a run
#   launch/tpu_pod.sh stop                              saves and ends it
# The repository lies at REPO, from the home directory, on every worker: setup
# copies this one, as it is, and installs it, with a Python from apt where none
# is new enough. Each worker goes on when this shell ends, and writes
# LOGS/HOST.log; what is followed is worker 0, and warnings and errors of the
# others. RETRIES and PAUSE are those of restart.sh, PYTHON is that of the
# workers. DRY_RUN=1 prints the command.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}"
printf -v settings '%q ' "REPO=${REPO:-vjepa_jax}" "LOGS=${LOGS:-logs}" \
  "RETRIES=${RETRIES:-10}" "PAUSE=${PAUSE:-30}" "PYTHON=${PYTHON:-}"
pod=("$TPU" --zone="$ZONE" --worker=all)
code=vjepa_jax_code.tar.gz

# What follows runs on the workers, hence the single quotes.
# shellcheck disable=SC2016
prepare='cd "$REPO" || {
  echo "$(hostname): no $REPO here, launch/tpu_pod.sh setup brings it" >&2
  exit 2
}
mkdir -p "$LOGS" || exit 2
log="$LOGS/$(hostname).log" pid_file="$LOGS/$(hostname).pid"
pid="$(cat "$pid_file" 2>/dev/null || true)"
is_running() { [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; }
pick() {
  case "$(hostname)" in
    *-w-[1-9]*) grep --line-buffered -E "^[WEF][0-9]|rror: |^restart.sh: " ;;
    *) cat ;;
  esac
}
follow() {
  tail --pid="$pid" -n "$1" -F "$log" | pick | sed -u "s/^/$(hostname): /"
}'
# shellcheck disable=SC2016
setup='set -e
INSTALL_PYTHON=1
source launch/environment.sh tpu,gcs
echo "$(hostname): $(python --version) and the repository are there"'
# shellcheck disable=SC2016
start='if is_running; then
  echo "$(hostname): runs already; stop ends it, logs follows it" >&2
  exit 2
fi
source launch/environment.sh tpu,gcs || exit 2
touch "$log"
lines="$(wc -l < "$log")"
setsid nohup bash launch/restart.sh python main.py --coordinator=auto "$@" \
  >> "$log" 2>&1 < /dev/null &
pid=$!
echo "$pid" > "$pid_file"
follow "+$((lines + 1))"
wait "$pid"'
# shellcheck disable=SC2016
logs='is_running || echo "$(hostname): no run" >&2
follow 50'
# shellcheck disable=SC2016
stop='is_running || exit 0
kill -TERM "$pid"
follow 1'

case "${1:-}" in
  setup)
    # shellcheck disable=SC2016
    unpack='mkdir -p "$REPO" && tar -xzf '"$code"' -C "$REPO" && rm '"$code"
    action="$setup" arguments='' prepare="$unpack || exit 2
$prepare"
    ;;
  logs) action="$logs" arguments='' ;;
  stop) action="$stop" arguments='' ;;
  --*) action="$start" && printf -v arguments ' %q' "$@" ;;
  *)
    echo "usage: $0 setup | --config=... --workdir=... | logs | stop" >&2
    exit 2
    ;;
esac
remote="export $settings
set --$arguments
$prepare
$action"

command=(gcloud compute tpus tpu-vm ssh "${pod[@]}" --command="$remote")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
if [ "$1" = setup ]; then
  cd "$(dirname "$0")/.."
  folder="$(mktemp -d)"
  trap 'rm -r "$folder"' EXIT
  # As it is, changes and new files too, but nothing that git ignores.
  git ls-files -z --cached --others --exclude-standard |
    tar --null --files-from=- --ignore-failed-read -czf "$folder/$code"
  gcloud compute tpus tpu-vm scp "$folder/$code" "$TPU:" \
    --zone="$ZONE" --worker=all
fi
"${command[@]}"
