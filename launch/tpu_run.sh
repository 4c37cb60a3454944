#!/usr/bin/env bash
# A run on the workers of tpu_pod.sh, which sources this, from its start to its end.
# shellcheck disable=SC2034,SC2154 # name, where, folder, setting and so on are that script's

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
      say "${#states[@]} of $workers workers answer; $called is $state"
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
  if [[ $state == UNKNOWN && ! $outcome ]]; then die "$unready" "gcloud's message is above"; fi
  if is_coming "$state" && wait_ready; then state=READY; fi
  case $state in
    READY) return ;;
    # Deleted by this very command, which then did not get new ones.
    NONE) [[ ! $remaking ]] || { each_resource request && wait_ready && setup; return; } ;;&
    NONE) die "$unready" "there is no $called in $zone; launch/tpu_pod.sh create ${identity[*]}" ;;
  esac
  ((retries > 0)) || die 75 "$called is $state; delete and create it, or give train --retries=N"
  say "$called is $state; making it again: ${setting[type]} ${setting[topology]}${spot:+, spot}"
  remaking=1
  delete '' && each_resource request && wait_ready && setup
}

# A run that goes on, or a new one.
start() {
  know_workers || return
  probe
  if (($(count new) > 0)); then
    [[ $outcome ]] || die "$unready" "no code on $called yet; launch/tpu_pod.sh setup ${identity[*]}"
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

# An address in another form is refused as the programs refuse it, see stem_jax/storage.py.
check_address() {
  local scheme slashes rest
  [[ $1 =~ ^([A-Za-z][A-Za-z0-9+.-]+):(/*)(.*)$ ]] || return 0
  scheme=${BASH_REMATCH[1],,} slashes=${BASH_REMATCH[2]} rest=${BASH_REMATCH[3]}
  case $scheme in
    gs | gcs) scheme=gs ;;
    s3 | s3a | s3n) scheme=s3 ;;
    *) return 0 ;;
  esac
  if [[ ! ${rest%%/*} ]]; then
    die 1 "--workdir=$1 names no bucket; give $scheme://BUCKET/FOLDER"
  elif [[ $1 != "$scheme://$rest" ]]; then
    die 1 "--workdir=$1 is an address, which is written $scheme://$rest; give that"
  fi
}

# Every worker sees it, and no setup empties it.
need_workdir() {
  local flag before=''
  workdir=''
  for flag in "${flags[@]}"; do
    if [[ $before == --workdir ]]; then workdir=$flag; fi
    if [[ $flag == --workdir=* ]]; then workdir=${flag#*=}; fi
    before=$flag
  done
  check_address "$workdir"
  [[ $workdir =~ ^(/|gs://|s3://) ]] ||
    wrong "train: ${workdir:+"--workdir=$workdir is not absolute; "}give" \
      "-- --workdir=/SHARED/RUN, a folder that all workers share, or one in a bucket"
}

train() {
  if [[ $elastic && ! $only ]]; then
    train_elastic
    return
  fi
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
      # On the slices that are left.
      if [[ $only && $outcome =~ ^(gone|broken)$ ]]; then end_workers '' "$grace"; fi
      if [[ $outcome =~ ^(gone|broken)$ ]]; then end_stream 0; else end_stream 15; fi
    else
      outcome=${outcome:-failed}
    fi
    case $outcome in
      complete) say "the run is complete" && return ;;
      stopped)
        say "the run was stopped; the same command continues it"
        # By which elastic_pod.py tells it from one that is complete.
        if [[ $only ]]; then exit 79; fi
        return
        ;;
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
