#!/usr/bin/env bash
# Elastic runs of tpu_pod.sh, which sources this: elastic_pod.py decides on which slices a run goes
# on, and calls tpu_pod.sh with --only=NUMBERS for what is to be done on them.
# shellcheck disable=SC2034,SC2154 # name, where, folder, setting and so on are that script's

train_elastic() {
  local command=("${PYTHON:-python}" -m launch.elastic_pod "$slices" "${setting[type]}"
    "${setting[topology]}" "$retries" "$poll" "${pod_flags[@]}" -- "${flags[@]}")
  need_shape "train --elastic"
  need_workdir
  [[ $program == train ]] || wrong "--elastic keeps a training going, not --program=$program"
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
  cd "$root" || return
  if [[ $dry_run ]]; then
    need_slices && probe
    local part shown=()
    for part in "${command[@]}"; do [[ $part == --dry-run ]] || shown+=("$part"); done
    run "${shown[@]}"
    # Which prints what it would run while all slices answer.
    "${command[@]}"
    return
  fi
  # An earlier command that was lost may have left a run on slices that this one would not use.
  need_slices && probe
  if (($(count running) > 0)); then
    say "a run is going on; it saves and ends first"
    end_workers stopped $((10 * grace))
  fi
  "${command[@]}" 3>&- &
  local python=$! code=0
  trap 'kill -TERM "$python" 2>/dev/null || true' INT TERM HUP
  wait "$python" || code=$?
  while kill -0 "$python" 2>/dev/null; do
    code=0
    wait "$python" || code=$?
  done
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  return "$code"
}

# Succeeds if a run can be started on the slices. Processes of one that was lost are ended.
answering() {
  [[ $(pod_state) == READY ]] && know_workers && probe && ((${#states[@]} == workers)) || return
  if (($(count running) > 0)); then
    on_workers all worker_signal "$folder" KILL '' || true
    return 1
  fi
  (($(count new) == 0))
}

# Makes a lost slice again, and puts code on it. 3: machines were asked for.
mend() {
  local since=$SECONDS
  if ((retries > 0)); then remaking=1; fi
  while prepare; do
    if know_workers && probe && ((${#states[@]} == workers)); then
      (($(count new) == 0)) || setup || return
      exit $((requested ? 3 : 0))
    fi
    if ((SECONDS - since >= silence)); then outcome=broken since=$SECONDS; else outcome=''; fi
    nap "$poll"
  done
  return 1
}

# The step of the newest whole checkpoint in a folder that the workers share.
saves() {
  know_workers && on_workers 0 worker_saves "$workdir"
}
