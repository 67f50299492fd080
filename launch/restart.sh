#!/usr/bin/env bash
# Runs a command again until it is done:
#   launch/restart.sh python main.py --config=... --workdir=...
# main.py's exit codes decide: 0 (done) and 2 (a mistake) end it; 75 (saved and
# left, for the platform wanted the machine) restarts it; anything else restarts
# it too, but no more than RETRIES failures in a row: an attempt that lasted an
# hour counts anew. A SIGTERM to this script goes to the command, which saves,
# and is not restarted. PAUSE is in seconds.
set -uo pipefail
RETRIES="${RETRIES:-10}"
PAUSE="${PAUSE:-30}"

say() { echo "restart.sh: $(date +'%F %T') $*" >&2; }

stopped=
child=
stop() {
  stopped=1
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

failures=0
while :; do
  SECONDS=0
  # A process group of its own: what a killed command leaves behind, such as
  # decoding workers, ends with it.
  setsid "$@" &
  child=$!
  # The signal may have come before there was one to tell.
  [ -n "$stopped" ] && kill -TERM "$child" 2>/dev/null
  wait "$child"
  code=$?
  # A signal ends a wait before the command has ended.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
  kill -KILL -- "-$child" 2>/dev/null
  child=
  if [ "$code" = 0 ] || [ "$code" = 2 ] || [ -n "$stopped" ]; then
    say "ended with code $code"
    exit "$code"
  elif [ "$code" = 75 ]; then
    say "preempted, restarting in $PAUSE s"
  else
    [ "$SECONDS" -ge 3600 ] && failures=0
    failures=$((failures + 1))
    if [ "$failures" -gt "$RETRIES" ]; then
      say "failed with code $code after $RETRIES restarts, giving up"
      exit "$code"
    fi
    say "failed with code $code, restart $failures of $RETRIES in $PAUSE s"
  fi
  sleep "$PAUSE" &
  wait $! || exit "$code"
done
