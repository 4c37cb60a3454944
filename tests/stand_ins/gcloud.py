#!/usr/bin/env python3
"""A stand-in for gcloud: TPU slices whose workers are folders on this machine.

$GCLOUD_STATE is its memory: calls.jsonl (what it was asked), resources/NAME.json (what there is of
a queued resource; tests edit it to preempt its slices or cut off workers), workers/N (the home of
worker N, through all slices; other commands of its are in worker.sh). Slice I of several is the
node PREFIX-I, whatever queued resource it belongs to.
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
RESOURCES = STATE / "resources"
WORKERS = 2
GROUPS = {
    "queued-resources create": "zone project node-id node-count node-prefix accelerator-type type "
    "topology runtime-version spot reserved valid-until-duration",
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


def record(name: str) -> Path:
    return RESOURCES / f"{name}.json"


def there(names: list[str]) -> dict:
    """The queued resource, if there is one of that name."""
    if not record(names[0]).exists():
        fail(f"NOT_FOUND: Resource '{names[0]}' was not found")
    return json.loads(record(names[0]).read_text())


def node_of(names: list[str]) -> dict:
    """The queued resource that has this node, if its machines are there."""
    for path in RESOURCES.glob("*.json"):
        facts = json.loads(path.read_text())
        if names[0] in facts["nodes"] and facts["states"] == ["ACTIVE"]:
            return facts
    fail("NOT_FOUND: the node is not there")


def workers_of(node: str) -> range:
    """Its workers, through all slices."""
    _, _, number = node.rpartition("-")
    first = WORKERS * int(number) if number.isdecimal() else 0
    return range(first, first + WORKERS)


def queued_resources_create(names, flags):
    refusals = STATE / "refusals"
    if refusals.exists() and (left := int(refusals.read_text())):
        refusals.write_text(str(left - 1))
        fail("RESOURCE_EXHAUSTED: quota")
    if record(names[0]).exists():
        fail(f"ALREADY_EXISTS: Resource '{names[0]}' already exists")
    if ("node-id" in flags) == ("node-count" in flags):
        fail("exactly one of --node-id and --node-count", 2)
    nodes = [flags.get("node-id")]
    if "node-count" in flags:
        prefix = flags.get("node-prefix", names[0])
        nodes = [f"{prefix}-{i}" for i in range(int(flags["node-count"]))]
    for number in (number for node in nodes for number in workers_of(node)):
        shutil.rmtree(STATE / "workers" / str(number), ignore_errors=True)
        (STATE / "workers" / str(number)).mkdir(parents=True)
    commands = STATE / "bin"
    commands.mkdir(exist_ok=True)
    for name in ("curl", "python3", "python3.11", "python3.12", "python3.13"):
        (commands / name).unlink(missing_ok=True)
        (commands / name).symlink_to(Path(__file__).resolve().parent / "worker.sh")
    states = os.environ.get("GCLOUD_STATES", "ACTIVE").split()
    facts = {"name": names[0], "states": states, "nodes": nodes, "node": "READY", "cut": []}
    RESOURCES.mkdir(exist_ok=True)
    record(names[0]).write_text(json.dumps(facts))


def queued_resources_describe(names, flags):
    facts = there(names)
    assert flags["format"] == "value(state.state)"
    print(facts["states"][0])
    if len(facts["states"]) > 1:
        del facts["states"][0]
        record(names[0]).write_text(json.dumps(facts))


def queued_resources_delete(names, flags):
    facts = there(names)
    if "quiet" not in flags:
        fail("it would have asked")
    if facts["states"] == ["ACTIVE"] and "force" not in flags:
        fail("FAILED_PRECONDITION: its nodes are there")
    record(names[0]).unlink()


def queued_resources_list(names, flags):
    for path in sorted(RESOURCES.glob("*.json")):
        facts = json.loads(path.read_text())
        print(facts["name"], flags["zone"], facts["states"][0])


def tpu_vm_describe(names, flags):
    answers = {
        "value(state)": node_of(names)["node"],
        "value(networkEndpoints.len())": WORKERS,
        "value(networkEndpoints[0].ipAddress)": f"address-of-{names[0]}",
    }
    print(answers[flags["format"]])


def chosen(names: list[str], flags: dict) -> list[int]:
    """The workers of --worker, if they can be reached."""
    if node_of(names)["node"] != "READY":
        fail("the TPU is in state PREEMPTED, which makes it unusable")
    workers = workers_of(names[0])
    return list(workers) if flags["worker"] == "all" else [workers[int(flags["worker"])]]


def tpu_vm_ssh(names, flags):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running, cut = [], node_of(names)["cut"]
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
            "JAX_PROCESS_ID": str(number % WORKERS),
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
