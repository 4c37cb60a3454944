#!/bin/bash
# Commands of a stand-in worker, by the name it is called by: what the image of a TPU VM brings along,
# and the Python of its environment, which is the real $GCLOUD_PYTHON but for pip.
here=$(readlink -f "$0")
environment() { mkdir -p "$1/bin" && ln -s "$here" "$1/bin/python"; }
case ${0##*/} in
  curl) # the metadata server
    [[ $* == *"Metadata-Flavor: Google"* ]] || exit 22
    [[ $* == *http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number ]] || exit 22
    printf %s "$JAX_PROCESS_ID"
    ;;
  python3*) # with $GCLOUD_OLD_PYTHON it is too old, and comes without venv
    case "$1 $2" in
      "-c "*) [[ ! $GCLOUD_OLD_PYTHON ]] ;;
      "-m venv") environment "$3" ;;
      "-m pip") [[ ${*:3} == *" uv" ]] && mkdir -p ~/.local/bin && ln -s "$here" ~/.local/bin/uv ;;
    esac
    ;;
  uv) [[ "$1 ${*: -2}" == "venv --python=3.12 venv" ]] && environment venv ;;
  python)
    if [[ "$1 $2" == "-m pip" ]]; then
      printf '%s\n' "${@:3}" >~/pip.txt
    else
      exec "$GCLOUD_PYTHON" "$@"
    fi
    ;;
esac
