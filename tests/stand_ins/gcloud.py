#!/usr/bin/env python3
"""A stand-in for gcloud: one TPU slice whose workers are folders on this machine.

$GCLOUD_STATE is its memory: calls.jsonl (what it was asked), slice.json (what there is; tests edit
it to preempt the slice or cut off workers), workers/N (the home of worker N; other commands of its
are in worker.sh).
$GCLOUD_PYTHON is the Python of the workers, $GCLOUD_OLD_PYTHON=1 makes that of their image too old.
$GCLOUD_STATES are the states that a new slice goes through. The file refusals, if it is there, is
the number of slices that it will refuse to create. A flag that the real one does not have is
refused.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ["GCLOUD_STATE"])
SLICE = STATE / "slice.json"
WORKERS = 2
GROUPS = {
    "queued-resources create": "zone project node-id accelerator-type type topology "
    "runtime-version spot reserved valid-until-duration",
    "queued-resources describe": "zone project format",
    "queued-resources delete": "zone project force quiet",
    "queued-resources list": "zone project",
    "tpu-vm describe": "zone project format",
    "tpu-vm ssh": "zone project worker command ssh-flag",
    "tpu-vm scp": "zone project worker",
}


def fail(message: str, code: int = 1):
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(code)


def main(argv: list[str]) -> None:
    with (STATE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(argv) + "\n")
    alpha = argv[:1] == ["alpha"]
    argv = argv[alpha:]
    if argv[:2] != ["compute", "tpus"] or (group := " ".join(argv[2:4])) not in GROUPS:
        fail(f"Invalid choice: {argv}", 2)
    flags, names = {}, []
    for argument in argv[4:]:
        if argument.startswith("--"):
            key, _, value = argument[2:].partition("=")
            if key not in GROUPS[group].split() and not (alpha and key == "reservation"):
                fail(f"unrecognized arguments: {argument}", 2)
            flags[key] = value
        else:
            names.append(argument)
    if "zone" not in flags:
        fail("zone is required", 2)
    globals()[group.replace("-", "_").replace(" ", "_")](names, flags)


def there(names: list[str]) -> dict:
    """The slice, if it has that name."""
    facts = json.loads(SLICE.read_text()) if SLICE.exists() else {}
    if facts.get("name") != names[0]:
        fail(f"NOT_FOUND: Resource '{names[0]}' was not found")
    return facts


def queued_resources_create(names, flags):
    refusals = STATE / "refusals"
    if refusals.exists() and (left := int(refusals.read_text())):
        refusals.write_text(str(left - 1))
        fail("RESOURCE_EXHAUSTED: quota")
    if SLICE.exists():
        fail(f"ALREADY_EXISTS: Resource '{names[0]}' already exists")
    shutil.rmtree(STATE / "workers", ignore_errors=True)
    for number in range(WORKERS):
        (STATE / "workers" / str(number)).mkdir(parents=True)
    commands = STATE / "bin"
    commands.mkdir(exist_ok=True)
    for name in ("curl", "python3", "python3.11", "python3.12", "python3.13"):
        (commands / name).unlink(missing_ok=True)
        (commands / name).symlink_to(Path(__file__).resolve().parent / "worker.sh")
    states = os.environ.get("GCLOUD_STATES", "ACTIVE").split()
    SLICE.write_text(json.dumps({"name": names[0], "states": states, "node": "READY", "cut": []}))


def queued_resources_describe(names, flags):
    facts = there(names)
    assert flags["format"] == "value(state.state)"
    print(facts["states"][0])
    if len(facts["states"]) > 1:
        del facts["states"][0]
        SLICE.write_text(json.dumps(facts))


def queued_resources_delete(names, flags):
    facts = there(names)
    if "quiet" not in flags:
        fail("it would have asked")
    if facts["states"] == ["ACTIVE"] and "force" not in flags:
        fail("FAILED_PRECONDITION: its nodes are there")
    SLICE.unlink()


def queued_resources_list(names, flags):
    if SLICE.exists():
        facts = json.loads(SLICE.read_text())
        print(facts["name"], flags["zone"], facts["states"][0])


def tpu_vm_describe(names, flags):
    facts = there(names)
    if facts["states"] != ["ACTIVE"]:
        fail("NOT_FOUND: the node is not there")
    print(
        {"value(state)": facts["node"], "value(networkEndpoints.len())": WORKERS}[flags["format"]]
    )


def chosen(names: list[str], flags: dict) -> list[int]:
    """The workers of --worker, if they can be reached."""
    facts = there(names)
    if facts["states"] != ["ACTIVE"] or facts["node"] != "READY":
        fail("the TPU is in state PREEMPTED, which makes it unusable")
    return list(range(WORKERS)) if flags["worker"] == "all" else [int(flags["worker"])]


def tpu_vm_ssh(names, flags):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running, cut = [], there(names)["cut"]
    for number in chosen(names, flags):
        if number in cut:
            running.append(subprocess.Popen(["false"]))
            continue
        home = STATE / "workers" / str(number)
        print(f"SSH: Attempting to connect to worker {number}...", file=sys.stderr)
        environment = {
            "PATH": f"{STATE / 'bin'}:/usr/bin:/bin",
            "HOME": str(home),
            "GCLOUD_PYTHON": os.environ["GCLOUD_PYTHON"],
            "GCLOUD_OLD_PYTHON": os.environ.get("GCLOUD_OLD_PYTHON", ""),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(WORKERS),
            "JAX_PROCESS_ID": str(number),
        }
        command = ["bash", "-c", flags["command"]]
        running.append(subprocess.Popen(command, cwd=home, env=environment))
    codes = [process.wait() for process in running]
    sys.exit(next((code for code in codes if code), 0))


def tpu_vm_scp(names, flags):
    source, destination = names
    name, _, path = destination.partition(":")
    for number in chosen([name], flags):
        shutil.copy(source, STATE / "workers" / str(number) / path)


if __name__ == "__main__":
    main(sys.argv[1:])
