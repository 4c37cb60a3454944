#!/usr/bin/env bash
# The workers of tpu_pod.sh together, which sources this: what it tells them and what they answer.
# shellcheck disable=SC2034,SC2154 # name, where, folder, setting and so on are that script's

# worker or all, function of tpu_worker.sh, its arguments. Workers are numbered through the slices.
# The remote shell gets the text as it is, so the arguments are quoted once.
on_workers() {
  local text position asked=() failed=0
  text="$(declare -f worker_index "$2")"$'\n'"$(printf '%q ' "${@:2}")"
  if ((${#members[@]} == 1)); then
    on_slice 0 "$1" "$text"
  elif [[ $1 != all ]]; then
    on_slice $(($1 / per_slice)) $(($1 % per_slice)) "$text"
  else
    for position in "${!members[@]}"; do
      on_slice "$position" all "$text" &
      asked+=($!)
      # What a dry run prints is more than a pipe takes at once, and would mix.
      [[ ! $dry_run ]] || wait $!
    done
    for position in "${asked[@]}"; do wait "$position" || failed=1; done
    return $failed
  fi
}

# position among the members, its worker or all, what they are to do. Slices find each other by the
# variables that JAX and libtpu read, of which a queued resource of several nodes sets the same in the
# machines' metadata, and GKE in its pods:
# https://github.com/jax-ml/jax/blob/jax-v0.10.2/jax/_src/clusters/cloud_tpu_cluster.py
on_slice() {
  local text=$3
  if ((${#members[@]} > 1)); then text="worker_offset=$(($1 * per_slice))"$'\n'$text; fi
  if [[ $coordinator ]]; then
    text="export MEGASCALE_COORDINATOR_ADDRESS=$coordinator MEGASCALE_SLICE_ID=$1 \
      MEGASCALE_NUM_SLICES=${#members[@]}"$'\n'$text
  fi
  run gcloud compute tpus tpu-vm ssh "$(node_of "${members[$1]}")" "${where[@]}" "--worker=$2" \
    "--command=$text" '--ssh-flag=-o ConnectTimeout=20 -o ServerAliveInterval=30' </dev/null
}

# How many workers there are; all slices have equally many.
know_workers() {
  local first
  first=$(node_of "${members[0]}")
  per_slice=$(describe tpu-vm "$first" 'value(networkEndpoints.len())' 1)
  if [[ ! $per_slice =~ ^[1-9][0-9]*$ ]]; then
    say "cannot tell how many workers $first has: $per_slice"
    return 1
  fi
  workers=$((per_slice * ${#members[@]}))
  coordinator=''
  if ((${#members[@]} > 1)); then
    coordinator=$(describe tpu-vm "$first" 'value(networkEndpoints[0].ipAddress)' ADDRESS)
    if [[ ! $coordinator =~ ^[A-Za-z0-9.:-]+$ ]]; then
      say "cannot tell the address of worker 0 of $first: $coordinator"
      return 1
    fi
  fi
}

# Of a single slice nothing must be known to reach its workers. Slices of an elastic run that are
# lost are left out.
need_slices() {
  local slice all=("${members[@]}") found=()
  if [[ $elastic && ! $only && ! $dry_run ]]; then
    for slice in "${all[@]}"; do
      members=("$slice")
      if [[ $(pod_state) == READY ]]; then found+=("$slice"); fi
    done
    members=("${found[@]}")
    ((${#members[@]} > 0)) || return
  fi
  ((${#members[@]} == 1)) || know_workers
}

# Unlike a bare sleep it does not hold back signals, nor our output open.
nap() {
  sleep "$1" >/dev/null 2>&1 3>&- &
  wait $! || true
}

setup() {
  local ready slice
  need_slices || return
  if [[ -z ${setting[repo]} ]]; then
    # What git tracks or would track, less what was deleted from the working tree.
    [[ $dry_run ]] || (
      cd "$root" && git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' path; do
          if [[ -e $path ]]; then printf '%s\0' "$path"; fi
        done | tar --null -T - -czf "$scratch/code.tar.gz"
    ) || die 1 "cannot pack $root: it must be a git working tree, or give --repo=URL"
    for slice in "${members[@]}"; do
      run gcloud compute tpus tpu-vm scp "$scratch/code.tar.gz" \
        "$(node_of "$slice"):stem_jax_code.tar.gz" "${where[@]}" --worker=all || return
    done
  fi
  ready=$(on_workers all worker_setup "$folder" "${setting[repo]}" "${setting[ref]}" \
    "${setting["setup-command"]}") || {
    say "error: setup failed on a worker of $called; its message is above"
    return 1
  }
  say "code and packages are on $(grep -c '^@worker' <<<"$ready" || true) workers"
}

# Fills states[] and notes[] by worker, with those that answer.
probe() {
  local mark index state note lines
  states=() notes=()
  lines=$(on_workers all worker_state "$folder" 2>"$scratch/error") || true
  if [[ $dry_run ]]; then
    lines=$(for ((index = 0; index < ${workers:-1}; index++)); do echo "@worker $index $dry_state"; done)
  fi
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
