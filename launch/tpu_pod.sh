#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from its creation to its deletion.
#
#   launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [flags] [-- training flags]
#
#   create   asks for the machines (a queued resource) and waits until they are there
#   setup    puts code and packages on every worker
#   train    runs `python -m stem_jax.train --multihost` with the training flags on every worker
#            (--workdir is needed: an absolute path that all of them share, or gs://...),
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
#   --slices=N               of so many slices: Multislice, machines NAME-0, NAME-1, ...
#   --elastic                a training on those slices that answer, each a queued resource of its
#                            own: lost ones are made again (--retries) and taken back at a save.
#                            For all commands; needs the packages on this machine ($PYTHON)
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
# shellcheck source=launch/tpu_gang.sh
source "$root/launch/tpu_gang.sh"
# shellcheck source=launch/tpu_run.sh
source "$root/launch/tpu_run.sh"
# shellcheck source=launch/tpu_elastic.sh
source "$root/launch/tpu_elastic.sh"

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

status() {
  local index state
  if [[ ! $name ]]; then
    run gcloud compute tpus queued-resources list "${where[@]}"
    return
  fi
  state=$(pod_state)
  # Of an elastic run, those slices that are ready are looked at.
  if [[ $state == READY || $elastic ]] && need_slices; then probe; fi
  if [[ $dry_run ]]; then return; fi
  echo "$name in $zone: $state, ${#states[@]} workers answer"
  for index in "${!states[@]}"; do echo "worker $index: ${states[index]} ${notes[index]#-}"; done
}

stop() {
  if need_slices; then probe; fi
  ((${#states[@]} > 0)) || die 1 "no worker of $name answers"
  if (($(count running) > 0)) || [[ $dry_run ]]; then end_workers stopped $((10 * grace)); fi
  say "no run on $name; its workers: ${states[*]}"
}

tell_bill() {
  local state what
  what="${setting[type]:-TPU} $(resource_of "${members[0]}") in $zone"
  state=$(pod_state)
  case $state in
    NONE) say "$what is not there, and costs nothing" ;;
    READY) say "$what is READY and billed; delete it with: $removal" ;;
    *) say "$what is $state and may be billed; delete it with: $removal" ;;
  esac
}

# Nobody should find machines on a bill that this script left without a word.
leave() {
  local code=$?
  trap - EXIT INT TERM HUP
  end_stream 0
  if [[ ! $dry_run && $name && ! $only && $subcommand != logs ]]; then
    members=("${everyone[@]}")
    each_resource tell_bill
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
  [slices]=1 [only]=''
)
for key in "${!setting[@]}"; do
  variable=STEM_TPU_${key^^}
  variable=${variable//-/_}
  setting[$key]=${!variable-${setting[$key]}}
done
environment=() flags=() states=() notes=() pod_flags=() per_slice='' coordinator='' workers=''
elastic=${STEM_TPU_ELASTIC-} requested=0 unready=1
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
    --elastic) elastic=1 ;;
    --*=*) option "${1%%=*}" "${1#*=}" ;;
    --*)
      (($# > 1)) || wrong "$1 needs a value"
      option "$1" "$2"
      pod_flags+=("$1")
      shift
      ;;
    *)
      [[ ! $subcommand ]] || wrong "two commands, $subcommand and $1; training flags go behind --"
      subcommand=$1
      ;;
  esac
  if [[ $1 != "$subcommand" ]]; then pod_flags+=("$1"); fi
  shift
done
only=${setting[only]} slices=${setting[slices]}
[[ $subcommand =~ ^(create|setup|train|logs|status|stop|delete)$ ||
  $only && $subcommand =~ ^(answering|mend|saves)$ ]] ||
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
[[ $slices =~ ^[1-9][0-9]*$ && ($slices -gt 1 || ! $elastic) ]] ||
  wrong "--slices=$slices must be a number${elastic:+, at least 2 for --elastic}"
[[ $worker =~ ^([0-9]+|all)$ ]] || wrong "--worker=$worker must be a number, or all"
[[ $folder =~ ^[A-Za-z0-9._-]+$ ]] || wrong "--folder=$folder must be a name, without slashes"
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  die 1 "there is no gcloud; get it from https://cloud.google.com/sdk/docs/install or --dry-run"

where=("--zone=$zone" ${setting[project]:+"--project=${setting[project]}"})
identity=("--name=$name" "${where[@]}")
if ((slices > 1)); then identity+=("--slices=$slices" ${elastic:+--elastic}); fi
mapfile -t everyone < <(seq 0 $((slices - 1)))
members=("${everyone[@]}") called=$name
if [[ $only ]]; then
  unready=75
  IFS=, read -r -a members <<<"$only"
  called=$(printf "$name-%s " "${members[@]}")
  called=${called% }
fi
removal="launch/tpu_pod.sh delete ${identity[*]}"
scratch=$(mktemp -d)
exec 3>&1
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

case $subcommand in
  logs) need_slices && on_workers "${setting[worker]}" worker_log "$folder" "${setting[worker]}" "$lasting" ;;
  delete) delete "$ask" ;;
  saves) need_workdir && saves ;;
  *) "$subcommand" ;;
esac
