#!/usr/bin/env bash
# The machines of tpu_pod.sh, which sources this: slices, each a node, of one queued resource. Of an
# elastic run each slice has a queued resource of its own, so that one can be made again alone.
# members[] are the slices that are meant, by number.
# shellcheck disable=SC2034,SC2154 # name, zone, where, identity, setting and so on are that script's

# slice: the name of its node, which gcloud makes of the prefix and the number
node_of() { if ((slices == 1)); then echo "$name"; else echo "$name-$1"; fi; }

# slice: the queued resource that it belongs to
resource_of() { if [[ $elastic ]]; then node_of "$1"; else echo "$name"; fi; }

# function and its arguments: once for each queued resource, with its slices as members
each_resource() {
  local slice all=("${members[@]}") members
  if [[ ! $elastic ]]; then
    members=("${all[@]}")
    "$@"
    return
  fi
  for slice in "${all[@]}"; do
    members=("$slice")
    "$@" || return
  done
}

# kind, name, format, answer in a dry run: what it says; NONE if there is no such thing; UNKNOWN
describe() {
  local command=(gcloud compute tpus "$1" describe "$2" "${where[@]}" "--format=$3")
  if [[ $dry_run ]]; then
    run "${command[@]}"
    echo "$4"
  elif ! "${command[@]}" 2>"$scratch/error"; then
    if grep -qi 'not_found\|not found' "$scratch/error"; then
      echo NONE
    else
      cat "$scratch/error" >&2
      echo UNKNOWN
    fi
  fi
}

# READY, or what the first queued resource or node that is not is instead. A preempted node may say
# so before its queued resource does.
pod_state() {
  local slice resource asked='' state=''
  for slice in "${members[@]}"; do
    resource=$(resource_of "$slice")
    if [[ $resource != "$asked" ]]; then
      asked=$resource
      state=$(describe queued-resources "$resource" 'value(state.state)' ACTIVE)
      if [[ $state != ACTIVE ]]; then break; fi
    fi
    state=$(describe tpu-vm "$(node_of "$slice")" 'value(state)' READY)
    if [[ $state == NONE ]]; then state=MISSING; fi
    if [[ $state != READY ]]; then break; fi
  done
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
      say "gcloud has not told the state of $called for $silence s; its message is above"
      return 1
    fi
    if [[ $state != "$last" ]]; then say "$called in $zone is $state"; fi
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

# Asks for the machines of one queued resource.
request() {
  # Those of a named reservation are asked for by gcloud's alpha commands.
  local shape=("--accelerator-type=${setting[type]}") track=() tier=(${spot:+--spot}) nodes resource
  resource=$(resource_of "${members[0]}")
  # https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create
  nodes=("--node-id=$resource")
  if ((slices > 1)) && [[ ! $elastic ]]; then
    nodes=("--node-count=$slices" "--node-prefix=$name")
  fi
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
  requested=1
  run gcloud "${track[@]}" compute tpus queued-resources create "$resource" "${nodes[@]}" \
    "${where[@]}" "${shape[@]}" "--runtime-version=${setting["runtime-version"]}" "${tier[@]}"
}

request_missing() {
  local state=NONE resource
  resource=$(resource_of "${members[0]}")
  if [[ ! $dry_run ]]; then state=$(pod_state); fi
  case $state in
    NONE) request ;;
    UNKNOWN) die 1 "gcloud cannot tell whether $resource exists; its message is above" ;;
    *) say "$resource is there already" ;;
  esac
}

create() {
  need_shape create
  each_resource request_missing
  wait_ready || die 1 "$called will not become ready; the reason is in: gcloud compute tpus" \
    "queued-resources describe $(resource_of "${members[0]}") ${where[*]}"
  say "next: launch/tpu_pod.sh setup ${identity[*]}"
}

give_back() {
  if [[ $elastic && ! $dry_run && $(pod_state) == NONE ]]; then return; fi
  run gcloud compute tpus queued-resources delete "$(resource_of "${members[0]}")" "${where[@]}" \
    --force --quiet
}

delete() {
  if [[ $1 && ! $dry_run ]]; then
    [[ -t 0 ]] || wrong "delete asks on a terminal only; give --yes"
    read -r -p "Delete $called in $zone with all that is on its machines? [y/N] "
    [[ $REPLY == [yY]* ]] || die 1 "not deleted"
  fi
  each_resource give_back
}
