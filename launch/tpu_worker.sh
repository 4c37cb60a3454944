#!/usr/bin/env bash
# What tpu_pod.sh does on a worker: it sends these functions there as text, each when it is needed.
# They start in the home folder, and $1 is the folder under it that holds
#   code/ venv/        the sources and their packages
#   code.files         what setup wrote into code/, if it sent a copy
#   log, log.previous  what the run says, and what the one before it said
#   lock               held by every process of a run
#   pid, group         process and process group of the run
#   exit               its exit code, once it has ended
#   stopped            mark: it was told to stop

worker_index() {
  # The number by which JAX finds its process index, from the machine's metadata server, and the
  # number of workers in the slices before this one.
  echo $((${worker_offset:-0} + $(curl -fsS -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)))
}

# folder, repository or nothing (then a copy was sent), its ref, command to run at the end
worker_setup() {
  set -eu
  mkdir -p "$1"
  cd "$1"
  if ! flock -n lock true; then
    echo "worker $(worker_index) has a run going on" >&2
    exit 1
  fi
  # Whatever else lies in code/ may be somebody's run: only what an earlier setup wrote goes.
  mkdir -p code
  if [ -e code.files ]; then
    (cd code && xargs -r -d '\n' rm -f -- <../code.files &&
      xargs -r -d '\n' dirname -- <../code.files | sort -u |
      xargs -r -d '\n' rmdir -p --ignore-fail-on-non-empty -- 2>/dev/null) || true
    rm code.files
  elif [ -d code/.git ] && [ -z "$2" ]; then
    (cd code && git ls-files -z | xargs -r -0 rm -f -- && rm -rf .git)
  elif ! [ -d code/.git ] && [ -n "$(ls -A code)" ]; then
    # An earlier version kept no list.
    mv code "code.before-$(date +%s)"
    mkdir code
  fi
  if [ -n "$2" ]; then
    if ! [ -d code/.git ]; then
      rm -rf clone
      git clone --quiet --no-checkout "$2" clone
      mv clone/.git code/
      rm -rf clone
    fi
    git -C code fetch --quiet "$2" "${3:-HEAD}"
    git -C code checkout --quiet --force --detach FETCH_HEAD
  else
    tar -tzf ~/stem_jax_code.tar.gz --quoting-style=literal >code.files
    tar -xzf ~/stem_jax_code.tar.gz -C code
  fi
  if ! [ -x venv/bin/python ]; then
    # TPU images may bring a Python that is too old for JAX, or one without venv.
    local python
    for python in python3.13 python3.12 python3.11 python3 ''; do
      if "${python:-true}" -c \
        'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    done
    if [ -n "$python" ]; then
      "$python" -m venv venv
    else
      python3 -m pip install --quiet --user uv ||
        python3 -m pip install --quiet --user --break-system-packages uv
      ~/.local/bin/uv venv --quiet --seed --python=3.12 venv
    fi
  fi
  # The TPU extra in the very range of requirements.txt.
  venv/bin/python -m pip install --quiet -r code/requirements.txt \
    "jax[tpu]$(sed -n 's/^jax\([<>=~!].*\)$/\1/p' code/requirements.txt)"
  if [ -n "$4" ]; then bash -c "$4"; fi
  # Never removed: a run may lie in it.
  local aside
  for aside in code.before-*; do
    if [ -d "$aside" ]; then
      echo "worker $(worker_index): $1/$aside holds what was in code/ before; delete it when" \
        "nothing in it is needed" >&2
    fi
  done
  echo "@worker $(worker_index) ready -"
}

# folder, command: starts the command in code/, apart from this connection
worker_start() {
  cd "$1/code" || exit 1
  shift
  # All processes of the run inherit the descriptor: the lock is free when the last one is gone.
  exec 9>>../lock
  if ! flock -n 9; then
    # Left over from a run that ended: while one of them lives, their group's number is theirs.
    if [ -e ../exit ]; then kill -KILL -- "-$(cat ../group)"; fi
    if ! flock -w 10 9; then
      echo "worker $(worker_index) has a run going on" >&2
      exit 1
    fi
  fi
  rm -f ../exit ../pid ../stopped
  if [ -e ../log ]; then mv ../log ../log.previous; fi
  setsid bash -c 'echo $$ >../group
    "$@" &
    echo $! >../pid
    wait $!
    echo $? >../exit.new
    mv ../exit.new ../exit' worker "$@" >../log 2>&1 </dev/null &
  # Whoever asks next finds the files.
  until [ -e ../pid ]; do sleep 0.02; done
}

# folder: prints "@worker INDEX new|idle|running|lost|exit:CODE complete|stopped|-"
worker_state() {
  local state=new note=-
  if cd "$1" 2>/dev/null; then
    if ! flock -n lock true; then
      state=running
    elif [ -e pid ]; then
      state=lost
    elif [ -x venv/bin/python ]; then
      state=idle
    fi
    # Looked for last: it is written before the lock is free.
    if [ -e exit ]; then state=exit:$(cat exit); fi
    # A progress bar ends what it says by a carriage return.
    if [ -e log ] && tr '\r' '\n' <log | grep -q '^run complete'; then
      note=complete
    elif [ -e stopped ]; then
      note=stopped
    fi
  fi
  echo "@worker $(worker_index) $state $note"
}

# folder, TERM (to the run itself: it saves) or KILL (to all its processes), mark to leave
worker_signal() {
  if ! cd "$1" 2>/dev/null || flock -n lock true; then return; fi
  if [ -n "$3" ]; then touch "$3"; fi
  if [ "$2" = TERM ]; then kill -TERM "$(cat pid)"; else kill -KILL -- "-$(cat group)"; fi
}

# work folder: the step of the newest checkpoint; one that is being written has no number for a name
worker_saves() {
  if [ -d "$1" ]; then
    find "$1/checkpoints" -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null |
      grep -x '[0-9]*' | sort -n | tail -n 1 | grep . || echo 0
  fi
}

# folder, first byte: what the run says from there on, until it ends
worker_follow() {
  cd "$1" && tail -s 0.3 -c "+$2" --pid="$(cat group)" -f log
}

# folder, all (the last lines, with the worker's number) or one, -f or nothing
worker_log() {
  cd "$1" || exit 1
  local follow=()
  if [ -n "$3" ]; then follow=(-f --pid="$(cat group)"); fi
  if [ "$2" = all ]; then
    tail -n 40 "${follow[@]}" log | sed -u "s/^/[$(worker_index)] /"
  else
    tail -n +1 "${follow[@]}" log
  fi
}
