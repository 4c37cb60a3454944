#!/usr/bin/env bash
# The machines of tpu_pod.sh, which sources this: a queued resource and its one node, of one name.
# shellcheck disable=SC2154 # name, zone, where, identity, setting and so on are that script's

# kind, format, answer in a dry run: what it says; NONE if there is no such thing; UNKNOWN
describe() {
  local command=(gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=$2")
  if [[ $dry_run ]]; then
    run "${command[@]}"
    echo "$3"
  elif ! "${command[@]}" 2>"$scratch/error"; then
    if grep -qi 'not_found\|not found' "$scratch/error"; then
      echo NONE
    else
      cat "$scratch/error" >&2
      echo UNKNOWN
    fi
  fi
}

# READY, or what the queued resource or its node is instead. A preempted node may say so first.
pod_state() {
  local state
  state=$(describe queued-resources 'value(state.state)' ACTIVE)
  if [[ $state == ACTIVE ]]; then
    state=$(describe tpu-vm 'value(state)' READY)
    if [[ $state == NONE ]]; then state=MISSING; fi
  fi
  echo "$state"
}

is_coming() {
  case $1 in
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | STARTING | RESTARTING) return 0 ;;
    REPAIRING | REIMAGING | UNKNOWN) return 0 ;;
    *) return 1 ;;
  esac
}

wait_ready() {
  local state last='' known=$SECONDS
  while :; do
    state=$(pod_state)
    if [[ $state != UNKNOWN ]]; then known=$SECONDS; fi
    if ((SECONDS - known >= silence)); then
      say "gcloud has not told the state of $name for $silence s; its message is above"
      return 1
    fi
    if [[ $state != "$last" ]]; then say "$name in $zone is $state"; fi
    last=$state
    if [[ $state == READY ]]; then return 0; fi
    if ! is_coming "$state"; then return 1; fi
    nap "$poll"
  done
}

need_shape() {
  [[ ${setting[type]} && ${setting["runtime-version"]} ]] ||
    wrong "$1 needs --type and --runtime-version"
}

request() {
  # Those of a named reservation are asked for by gcloud's alpha commands.
  local shape=("--accelerator-type=${setting[type]}") track=() tier=(${spot:+--spot})
  if [[ $reserved ]]; then tier=(--reserved); fi
  if [[ ${setting[reservation]} ]]; then
    track=(alpha) tier=("--reservation=${setting[reservation]}")
  fi
  if [[ ${setting[topology]} ]]; then
    shape=("--type=${setting[type]}" "--topology=${setting[topology]}")
  fi
  if [[ ${setting["valid-until"]} ]]; then
    tier+=("--valid-until-duration=${setting["valid-until"]}")
  fi
  run gcloud "${track[@]}" compute tpus queued-resources create "$name" "--node-id=$name" \
    "${where[@]}" "${shape[@]}" "--runtime-version=${setting["runtime-version"]}" "${tier[@]}"
}

create() {
  local state=NONE
  need_shape create
  if [[ ! $dry_run ]]; then state=$(pod_state); fi
  case $state in
    NONE) request ;;
    UNKNOWN) die 1 "gcloud cannot tell whether $name exists; its message is above" ;;
    *) say "$name is there already" ;;
  esac
  wait_ready || die 1 "$name will not become ready; the reason is in: gcloud compute tpus" \
    "queued-resources describe $name ${where[*]}"
  say "next: launch/tpu_pod.sh setup ${identity[*]}"
}

delete() {
  if [[ $1 && ! $dry_run ]]; then
    [[ -t 0 ]] || wrong "delete asks on a terminal only; give --yes"
    read -r -p "Delete $name in $zone with all that is on its machines? [y/N] "
    [[ $REPLY == [yY]* ]] || die 1 "not deleted"
  fi
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}
