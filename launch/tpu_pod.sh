#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from its creation to its deletion.
#
#   launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [flags] [-- training flags]
#
#   create   asks for the machines (a queued resource) and waits until they are there
#   setup    puts code and packages on every worker
#   train    runs `python -m stem_jax.train --multihost` with the training flags on every worker
#            (--workdir is needed: an absolute path that all of them share),
#            shows what worker 0 says, and starts it again if it was lost or preempted. While a run
#            goes on it only attaches to it; Ctrl-C detaches, and the run goes on
#   logs     what a worker said: --worker=N or all, --follow
#   status   state of machines and workers; without --name, all queued resources of the zone
#   stop     the run saves one checkpoint and ends; the machines stay
#   delete   gives the machines back; asks, unless --yes
#
#   --project=ID             default: the project of your gcloud configuration
#   --type=v5litepod-16      accelerator type; with --topology=2x2x2 its family, such as v4
#   --runtime-version=IMAGE  such as v2-alpha-tpuv5-lite
#   --spot                   cheaper machines, which can be preempted
#   --reserved               machines of a reservation; --reservation=NAME: of this one
#   --valid-until=6h         the request ends if there are none by then
#   --retries=N              train: starts a lost run again, N times at most (0); to be able to make
#                            preempted machines again it needs --type, --runtime-version and --spot
#   --repo=URL --ref=REF     setup: clones; without, it copies this working tree
#   --setup-command=COMMAND  setup: runs on every worker at its end; mounts the shared folder, say
#   --program=evaluate       train: another of stem_jax's programs that take --multihost
#   --env=NAME=VALUE         train: exported on the workers; may be repeated
#   --folder=stem_jax        where code, packages and logs are, under a worker's home folder
#   --coordinator-port=8476  where process 0 listens; firewalls may block JAX's own choice, 8482
#   --poll=10 --grace=60     seconds between looks; seconds to end in before being killed (stop: x10)
#   --silence=1800           seconds after which machines that never answer are made again
#   --dry-run --yes --help   prints every command and runs none; asks nothing; prints this
#
# Flags can be set as STEM_TPU_NAME, STEM_TPU_RUNTIME_VERSION..., --spot and --reserved by 1. train
# exits with 0 when the run is complete or was ended by `stop`, with 1 or 2 if its input was refused,
# with 75 if it was lost and no retry was left.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/tpu_worker.sh
source "$root/launch/tpu_worker.sh"
# shellcheck source=launch/tpu_machines.sh
source "$root/launch/tpu_machines.sh"

say() { printf 'tpu_pod%s: %s\n' "${dry_run:+ (dry run)}" "$*" >&2; }
die() {
  say "error: ${*:2}"
  exit "$1"
}
wrong() { die 2 "$*; see launch/tpu_pod.sh --help"; }

# Runs a command, or prints it in a dry run, past whatever captures its output.
run() {
  if [[ $dry_run ]]; then
    { printf '+' && printf ' %q' "$@" && echo; } >&3
  else
    "$@"
  fi
}

# worker, function of tpu_worker.sh, its arguments. The remote shell gets the text as it is, so the
# arguments are quoted once.
on_workers() {
  local text
  text="$(declare -f worker_index "$2")"$'\n'"$(printf '%q ' "${@:2}")"
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$text" \
    '--ssh-flag=-o ConnectTimeout=20 -o ServerAliveInterval=30' </dev/null
}

# Unlike a bare sleep it does not hold back signals, nor our output open.
nap() {
  sleep "$1" >/dev/null 2>&1 3>&- &
  wait $! || true
}

setup() {
  local ready
  if [[ -z ${setting[repo]} ]]; then
    # What git tracks or would track, less what was deleted from the working tree.
    [[ $dry_run ]] || (
      cd "$root" && git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' path; do
          if [[ -e $path ]]; then printf '%s\0' "$path"; fi
        done | tar --null -T - -czf "$scratch/code.tar.gz"
    ) || die 1 "cannot pack $root: it must be a git working tree, or give --repo=URL"
    run gcloud compute tpus tpu-vm scp "$scratch/code.tar.gz" "$name:stem_jax_code.tar.gz" \
      "${where[@]}" --worker=all || return
  fi
  ready=$(on_workers all worker_setup "$folder" "${setting[repo]}" "${setting[ref]}" \
    "${setting["setup-command"]}") || {
    say "error: setup failed on a worker of $name; its message is above"
    return 1
  }
  say "code and packages are on $(grep -c '^@worker' <<<"$ready" || true) workers"
}

# Fills states[] and notes[] by worker, with those that answer.
probe() {
  local mark index state note lines
  states=() notes=()
  lines=$(on_workers all worker_state "$folder" 2>"$scratch/error") || true
  if [[ $dry_run ]]; then lines="@worker 0 $dry_state"; fi
  while read -r mark index state note; do
    if [[ $mark == @worker && $index =~ ^[0-9]+$ ]]; then
      states[index]=$state notes[index]=$note
    fi
  done <<<"$lines"
}

count() { printf '%s\n' "${states[@]}" | grep -cx "$1" || true; }

# mark, seconds: tells the run to end, waits until it has, and kills it when that takes longer.
end_workers() {
  local deadline=$((SECONDS + $2))
  on_workers all worker_signal "$folder" TERM "$1" 2>"$scratch/error" || true
  while probe && (($(count running) > 0)); do
    if ((SECONDS >= deadline)); then
      say "killing the run on $(count running) workers: it did not end within $2 s"
      on_workers all worker_signal "$folder" KILL "$1" 2>"$scratch/error" || true
      deadline=$((SECONDS + 60))
    fi
    nap "$poll"
  done
}

# Shows what worker 0 says, in the background, from where the last connection broke off.
stream() {
  local seen=0
  if [[ $dry_run ]]; then
    on_workers 0 worker_follow "$folder" 1
    return
  fi
  if [[ -e $scratch/said ]]; then seen=$(wc -c <"$scratch/said"); fi
  # A process group of its own: ending gcloud alone would leave its ssh.
  set -m
  { on_workers 0 worker_follow "$folder" $((seen + 1)) 2>/dev/null | tee -a "$scratch/said"; } &
  streaming=$!
  set +m
}

streams() { [[ $streaming ]] && kill -0 "$streaming" 2>/dev/null; }

# seconds: waits so long for the last words
end_stream() {
  local deadline=$((SECONDS + $1))
  if [[ $streaming ]] && ! streams && ! wait "$streaming" && (($1 > 0)); then stream; fi
  while streams && ((SECONDS < deadline)); do nap 0.2; done
  if streams; then kill -- "-$streaming" 2>/dev/null || true; fi
  streaming=''
}

# Watches the run to its end. outcome: complete, stopped, refused, failed, gone (the machines) or
# broken (machines that are there and do not answer). culprit: a worker that failed.
follow() {
  local index state unanswered=0 answered=$SECONDS first='' failed useless
  outcome=''
  while [[ ! $outcome ]]; do
    probe
    failed=() useless=1
    for index in "${!states[@]}"; do
      state=${states[index]}
      if [[ $state != running && $state != exit:0 ]]; then
        if ((${#failed[@]} == 0)); then culprit=$index culprit_code=${state#exit:}; fi
        failed+=("worker $index $state")
        # 1 is refused input and 2 wrong flags: the same command would fail again.
        if [[ ! $state =~ ^exit:[12]$ ]]; then useless=''; fi
      fi
    done
    if ((${#states[@]} < workers)); then
      state=$(pod_state)
      say "${#states[@]} of $workers workers answer; $name is $state"
      if [[ $state != READY ]] && ! is_coming "$state"; then outcome=gone; fi
      if [[ $state == READY ]]; then unanswered=$((unanswered + 1)); fi
      # If none answers, our own network may be down, and the run well.
      if ((unanswered >= 5 && ${#states[@]} > 0 || SECONDS - answered >= silence)); then
        outcome=broken
      fi
    elif (($(count exit:0) == workers)) &&
      [[ $program != train || " ${notes[*]} " == *" complete "* ]]; then
      outcome=complete
    elif [[ " ${notes[*]} " == *" stopped "* ]]; then
      if (($(count running) == 0)); then outcome=stopped; fi
    elif ((${#failed[@]} > 0)); then
      first=${first:-$SECONDS}
      # Processes that are refused together do not end at the same time.
      if [[ ! $useless ]]; then
        outcome=failed
      elif (($(count running) == 0 || SECONDS - first >= grace)); then
        outcome=refused
      fi
      if [[ $outcome ]]; then say "$(printf '%s, ' "${failed[@]}")$(count running) running"; fi
    elif (($(count exit:0) == workers)); then
      # A machine that is shut down makes the run save and exit.
      say "the run ended before it was complete"
      outcome=failed
    else
      unanswered=0 answered=$SECONDS
      if ! streams && [[ ! $dry_run ]]; then stream; fi
    fi
    if [[ ! $outcome ]]; then nap "$poll"; fi
  done
}

# Machines that are ready. A queued resource that lost its machines gets no others.
prepare() {
  local state=BROKEN
  if [[ $outcome != broken ]]; then state=$(pod_state); fi
  if [[ $state == UNKNOWN && ! $outcome ]]; then die 1 "gcloud's message is above"; fi
  if is_coming "$state" && wait_ready; then state=READY; fi
  case $state in
    READY) return ;;
    # Deleted by this very command, which then did not get new ones.
    NONE) [[ ! $remaking ]] || { request && wait_ready && setup; return; } ;;&
    NONE) die 1 "there is no $name in $zone; launch/tpu_pod.sh create ${identity[*]}" ;;
  esac
  ((retries > 0)) || die 75 "$name is $state; delete and create it, or give train --retries=N"
  say "$name is $state; making it again: ${setting[type]} ${setting[topology]}${spot:+, spot}"
  remaking=1
  delete '' && request && wait_ready && setup
}

# A run that goes on, or a new one.
start() {
  workers=$(describe tpu-vm 'value(networkEndpoints.len())' 1)
  if [[ ! $workers =~ ^[1-9][0-9]*$ ]]; then
    say "cannot tell how many workers $name has: $workers"
    return 1
  fi
  probe
  if (($(count new) > 0)); then
    [[ $outcome ]] || die 1 "no code on $name yet; launch/tpu_pod.sh setup ${identity[*]}"
    setup || return
  fi
  if (($(count running) > 0)); then
    say "a run is going on; attaching to it"
  else
    say "starting on $workers workers"
    on_workers all worker_start "$folder" "${command[@]}" || say "not every worker has started"
  fi
  rm -f "$scratch/said"
  stream
}

# Every worker sees it, and no setup empties it.
need_workdir() {
  local flag before='' workdir=''
  for flag in "${flags[@]}"; do
    if [[ $before == --workdir ]]; then workdir=$flag; fi
    if [[ $flag == --workdir=* ]]; then workdir=${flag#*=}; fi
    before=$flag
  done
  [[ $workdir == /* ]] || wrong "train: ${workdir:+"--workdir=$workdir is not absolute; "}give" \
    "-- --workdir=/SHARED/RUN, a folder that all workers share"
}

train() {
  local tries=0 command
  if ((retries > 0)); then need_shape "train --retries"; fi
  if [[ $program == train ]]; then need_workdir; fi
  command=(env PYTHONUNBUFFERED=1 "JAX_COORDINATOR_PORT=${setting["coordinator-port"]}"
    "${environment[@]}" ../venv/bin/python -m "stem_jax.$program" --multihost "${flags[@]}")
  while :; do
    if prepare && start; then
      dry_state='exit:0 complete'
      follow
      if [[ $outcome =~ ^(failed|refused)$ ]]; then end_workers '' "$grace"; fi
      if [[ $outcome =~ ^(gone|broken)$ ]]; then end_stream 0; else end_stream 15; fi
    else
      outcome=${outcome:-failed}
    fi
    case $outcome in
      complete) say "the run is complete" && return ;;
      stopped) say "the run was stopped; the same command continues it" && return ;;
      refused)
        if ((culprit > 0)); then on_workers "$culprit" worker_log "$folder" one '' || true; fi
        die "$culprit_code" "worker $culprit refused the command"
        ;;
    esac
    ((tries < retries)) || die 75 "the run did not get to its end, and no retry is left" \
      "(--retries=$retries); the same command continues it"
    tries=$((tries + 1))
    say "retry $tries of $retries"
    nap "$poll"
  done
}

status() {
  local index state
  if [[ ! $name ]]; then
    run gcloud compute tpus queued-resources list "${where[@]}"
    return
  fi
  state=$(pod_state)
  if [[ $state == READY ]]; then probe; fi
  if [[ $dry_run ]]; then return; fi
  echo "$name in $zone: $state, ${#states[@]} workers answer"
  for index in "${!states[@]}"; do echo "worker $index: ${states[index]} ${notes[index]#-}"; done
}

stop() {
  probe
  ((${#states[@]} > 0)) || die 1 "no worker of $name answers"
  if (($(count running) > 0)) || [[ $dry_run ]]; then end_workers stopped $((10 * grace)); fi
  say "no run on $name; its workers: ${states[*]}"
}

# Nobody should find machines on a bill that this script left without a word.
leave() {
  local code=$? state what="${setting[type]:-TPU} $name in $zone"
  trap - EXIT INT TERM HUP
  end_stream 0
  if [[ ! $dry_run && $name && $subcommand != logs ]]; then
    state=$(pod_state)
    case $state in
      NONE) say "$what is not there, and costs nothing" ;;
      READY) say "$what is READY and billed; delete it with: $removal" ;;
      *) say "$what is $state and may be billed; delete it with: $removal" ;;
    esac
  fi
  rm -rf "$scratch"
  exit "$code"
}

option() {
  local key=${1#--}
  if [[ $key == env ]]; then
    [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || wrong "--env=$2 is not NAME=VALUE"
    environment+=("$2")
  elif [[ $key =~ ^[a-z-]+$ && -v setting[$key] ]]; then
    setting[$key]=$2
  else
    wrong "unknown flag $1"
  fi
}

declare -A setting=(
  [name]='' [zone]='' [project]='' [type]='' [topology]='' ["runtime-version"]='' [retries]=0
  [repo]='' [ref]='' ["setup-command"]='' [folder]=stem_jax ["coordinator-port"]=8476 [worker]=0
  [poll]=10 [grace]=60 [silence]=1800 [program]=train [reservation]='' ["valid-until"]=''
)
for key in "${!setting[@]}"; do
  variable=STEM_TPU_${key^^}
  variable=${variable//-/_}
  setting[$key]=${!variable-${setting[$key]}}
done
environment=() flags=() states=() notes=()
spot=${STEM_TPU_SPOT-} reserved=${STEM_TPU_RESERVED-} dry_run='' dry_state='idle -' ask=1
lasting='' subcommand=''
streaming='' outcome='' remaking='' culprit=0 culprit_code=1

while (($#)); do
  case $1 in
    --) flags=("${@:2}") && break ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;;
    --spot) spot=1 ;;
    --reserved) reserved=1 ;;
    --dry-run) dry_run=1 ;;
    --yes) ask='' ;;
    --follow) lasting=-f ;;
    --*=*) option "${1%%=*}" "${1#*=}" ;;
    --*)
      (($# > 1)) || wrong "$1 needs a value"
      option "$1" "$2"
      shift
      ;;
    *)
      [[ ! $subcommand ]] || wrong "two commands, $subcommand and $1; training flags go behind --"
      subcommand=$1
      ;;
  esac
  shift
done
[[ $subcommand =~ ^(create|setup|train|logs|status|stop|delete)$ ]] ||
  wrong "no command '$subcommand'"
name=${setting[name]} zone=${setting[zone]} folder=${setting[folder]}
retries=${setting[retries]} poll=${setting[poll]} grace=${setting[grace]}
silence=${setting[silence]} port=${setting["coordinator-port"]} worker=${setting[worker]}
program=${setting[program]}
[[ $program =~ ^[a-z_]+$ && -e $root/stem_jax/$program.py ]] ||
  wrong "--program=$program is none of stem_jax's"
[[ ! $spot || ! $reserved${setting[reservation]} ]] || wrong "--spot and a reservation exclude" \
  "each other"
[[ $zone ]] || wrong "--zone is missing"
[[ $name || $subcommand == status ]] || wrong "--name is missing"
[[ "$retries $grace $silence $port" =~ ^[0-9]+\ [0-9]+\ [0-9]+\ [0-9]+$ ]] &&
  [[ $poll =~ ^([0-9]+\.)?[0-9]+$ ]] || wrong "--retries=$retries, --grace=$grace," \
  "--silence=$silence, --coordinator-port=$port and --poll=$poll must be numbers"
[[ $worker =~ ^([0-9]+|all)$ ]] || wrong "--worker=$worker must be a number, or all"
[[ $folder =~ ^[A-Za-z0-9._-]+$ ]] || wrong "--folder=$folder must be a name, without slashes"
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  die 1 "there is no gcloud; get it from https://cloud.google.com/sdk/docs/install or --dry-run"

where=("--zone=$zone" ${setting[project]:+"--project=${setting[project]}"})
identity=("--name=$name" "${where[@]}")
removal="launch/tpu_pod.sh delete ${identity[*]}"
scratch=$(mktemp -d)
exec 3>&1
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

case $subcommand in
  logs) on_workers "${setting[worker]}" worker_log "$folder" "${setting[worker]}" "$lasting" ;;
  delete) delete "$ask" ;;
  *) "$subcommand" ;;
esac
