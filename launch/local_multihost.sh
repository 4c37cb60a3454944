#!/usr/bin/env bash
# Starts N processes of a run on this machine's CPU, as N hosts would run it.
#
#   launch/local_multihost.sh N [--devices=D] --config=configs/tiny.py --workdir=DIR [training flags]
#   launch/local_multihost.sh N --program=evaluate --workdir=DIR --niah [evaluation flags]
#   launch/local_multihost.sh N --elastic [--probe=COMMAND] --config=... --workdir=... [...]
#
# --program is any of stem_jax's that takes --multihost. Elastic, a run that loses processes goes on
# with those whose hosts answer (COMMAND exits with 0, HOST being their number): launch/elastic.py.
# Each process has D CPU devices (default 4). Process 0 speaks on stdout; what the others say on
# stderr carries their number. SIGTERM and SIGINT go to every process. If one fails, the others are
# ended after a grace period, and its exit status is the script's.
# Of a training run, all that is said is in DIR/logs, and a signal makes the processes save one
# checkpoint together and exit 0; the same command continues it.
# Needs bash 5.1.
set -euo pipefail

usage() {
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[[ $# -ge 1 && $1 =~ ^[1-9][0-9]*$ ]] || usage
count=$1
shift
devices=4
program=train
elastic=
while [[ ${1-} =~ ^--(devices|program)=|^--elastic$ ]]; do
  case $1 in
    --devices=*) devices=${1#--devices=} ;;
    --program=*) program=${1#--program=} ;;
    --elastic) elastic=1 ;;
  esac
  shift
done
[[ $devices =~ ^[1-9][0-9]*$ && $program =~ ^[a-z_]+$ ]] || usage

root=$(cd "$(dirname "$0")/.." && pwd)
[[ -e $root/stem_jax/$program.py ]] || usage
# This checkout's programs, wherever they are started: relative paths in the flags are the caller's.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
python=${PYTHON:-python}
if [[ $elastic ]]; then
  [[ $program == train ]] || usage
  exec "$python" "$root/launch/elastic.py" "$count" "$devices" "$@"
fi
# Time for the others to end by themselves when one has failed.
grace=${GRACE_SECONDS:-15}
port=${COORDINATOR_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS-} --xla_force_host_platform_device_count=$devices"
declare -A running # process ids
for ((index = 0; index < count; index++)); do
  command=("$python" -m "stem_jax.$program" --multihost "--coordinator=localhost:$port"
    "--num-processes=$count" "--process-index=$index" "$@")
  # Others have only their messages on stderr and their log to say; gloo would chat on stdout.
  if ((index == 0)); then
    "${command[@]}" &
  else
    # exec keeps the process itself, not a shell around it, as what a signal reaches.
    (exec "${command[@]}" >/dev/null 2> >(sed -u "s/^/[$index] /" >&2)) &
  fi
  running[$!]=1
done

# shellcheck disable=SC2317,SC2329 # called by the trap
signal_all() {
  for pid in "${!running[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
}
trap signal_all TERM INT

status=0
timer=
while ((${#running[@]} > 0)); do
  finished=
  code=0
  wait -n -p finished "${!running[@]}" $timer || code=$?
  # A signal to this script ends `wait` too, with no process finished. Of what ends while bash does
  # not wait, such as the second of two that are killed at once, it keeps the status, but no job.
  for pid in "${!running[@]}" $timer; do
    if [[ -z ${finished-} ]] && ! kill -0 "$pid" 2>/dev/null; then
      finished=$pid
      code=0
      wait "$pid" || code=$?
    fi
  done
  if [[ -z ${finished-} ]]; then continue; fi
  if [[ $finished == "$timer" ]]; then
    echo "local_multihost: ending the processes that wait for the one that failed" >&2
    kill -KILL "${!running[@]}" 2>/dev/null || true
    timer=
    continue
  fi
  unset "running[$finished]"
  if ((code != 0 && status == 0)); then
    status=$code
    sleep "$grace" >/dev/null 2>&1 &
    timer=$!
  fi
done
if [[ -n $timer ]]; then kill "$timer" 2>/dev/null || true; fi
exit "$status"
