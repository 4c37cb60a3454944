"""The flags of `python -m stem_jax.serve`."""

import argparse
import ipaddress
import math
import os

from stem_jax import cli
from stem_jax.errors import InputError

KEY_VARIABLE = "STEM_API_KEY"
_MOST_SLOTS = 4096


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags; `api_key` also from the environment. Exits with 2 for wrong ones, 0 for --help.

    Raises InputError for an empty key.
    """
    parser = cli.Parser("stem_jax.serve", description)
    add = parser.add_argument
    parser.add_run_folder("--workdir", required=True, help="folder of a training run")
    add("--step", type=int, help="checkpoint; without it, the newest")
    parser.add_files("--edits", default=[], help="patches of stem_jax.edit, in their order")
    add("--devices", type=int, default=1, help="that the model is divided over")
    add("--resident-rows", type=int, help="table rows kept on the devices")
    add("--slots", type=int, default=8, help="sequences at a time")
    add("--max-queue", type=int, default=64, help="sequences that may wait; more get status 429")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: of all networks")
    add("--port", type=int, default=8000, help="0: any that is free")
    add("--api-key", help=f"that clients have to send; better in {KEY_VARIABLE}: flags are seen")
    add("--model-name", help="that clients ask for; without it, the name of the folder")
    parser.add_path("--chat-template", help="file to use in place of the tokenizer's own")
    add("--write-timeout", type=float, default=30.0, help="seconds for a client that reads nothing")
    add("--drain-timeout", type=float, default=60.0, help="seconds for requests after SIGTERM")
    parser.add_cache_flag()
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port={args.port} must be from 0 to {2**16 - 1}")
    if not 1 <= args.slots <= _MOST_SLOTS:
        parser.error(f"--slots={args.slots} must be from 1 to {_MOST_SLOTS}")
    if args.max_queue < 0:
        parser.error(f"--max-queue={args.max_queue} must be at least 0")
    for flag, value in (("write", args.write_timeout), ("drain", args.drain_timeout)):
        if not (value > 0 and math.isfinite(value)):
            parser.error(f"--{flag}-timeout={value} must be more than 0 seconds")
    if args.model_name == "":
        parser.error("--model-name= is empty; give a name, or leave it out")
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE)
    if args.api_key is not None:
        # Files that keys are kept in often end with a line end, which no header can have.
        args.api_key = args.api_key.strip()
        if not args.api_key:
            raise InputError(f"--api-key or {KEY_VARIABLE} is empty; give a key, or leave it out")
    return args


def open_to_all(host: str, key: str | None) -> bool:
    """Whether other machines may use a server without a key."""
    return key is None and not is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is that of the machine itself, for itself alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
