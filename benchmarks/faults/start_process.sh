#!/usr/bin/env bash
# Starts FAULT_PYTHON as a process of a campaign's run, if asked with a clock or a network of its own.
#   FAULT_CLOCK=INDEX:LIBRARY:FILE   that process sees the clock that the file says (libfaketime)
#   FAULT_NETWORK=PREFIX:ADDRESS     process I is in the network namespace PREFIX.I, 0 at the address
set -euo pipefail
index=
arguments=()
for argument in "$@"; do
  case $argument in
    --process-index=*) index=${argument#*=} ;;
    --coordinator=localhost:*)
      if [[ -n ${FAULT_NETWORK-} ]]; then
        argument=--coordinator=${FAULT_NETWORK#*:}:${argument##*:}
      fi
      ;;
  esac
  arguments+=("$argument")
done
if [[ -n $index && ${FAULT_CLOCK-} == "$index":* ]]; then
  place=${FAULT_CLOCK#*:}
  # As another host's: its own wall, while time passes as everywhere and files are a server's.
  export LD_PRELOAD=${place%%:*} FAKETIME_TIMESTAMP_FILE=${place#*:}
  export FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1 FAKETIME_CACHE_DURATION=1
fi
if [[ -n $index && -n ${FAULT_NETWORK-} ]]; then
  exec ip netns exec "${FAULT_NETWORK%%:*}.$index" "$FAULT_PYTHON" "${arguments[@]}"
fi
exec "$FAULT_PYTHON" "${arguments[@]}"
