"""What trackers have of a run, read back from their own files and servers."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.children import free_port
from tests.launching import wait_until


def tensorboard_events(folder: Path) -> list:
    """Records of the files there: a length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def tensorboard_shows(folder: Path) -> dict[int, list]:
    """Values by step as TensorBoard shows them: a restart hides what stands from its step on."""
    shown: dict[int, list] = {}
    for event in tensorboard_events(folder):
        if event.session_log.status == 1:
            shown = {step: values for step, values in shown.items() if step < event.step}
        for value in event.summary.value:
            shown.setdefault(event.step, []).append(value)
    return shown


def wandb_files(workdir: Path) -> list[Path]:
    """Of the starts of a run without a network, in their order."""
    return sorted(workdir.glob("tracking/wandb/offline-run-*/*.wandb"))


def wandb_records(path: Path) -> list[dict]:
    """What wandb's own program reads in a file."""
    wandb = Path(sys.executable).with_name("wandb")
    said = subprocess.run(
        [wandb, "leet", "inspect", "--json", path], capture_output=True, text=True, timeout=120
    )
    return [json.loads(line) for line in said.stdout.splitlines()]


def wandb_history(records: list[dict]) -> list[tuple[int, dict]]:
    """Steps and their values, in the order of a file."""
    items = [r["history"] for r in records if r["type"] == "history"]
    return [(item["step"]["num"], item["item"]) for item in items]


@contextlib.contextmanager
def mlflow_server(folder: Path):
    """The address of MLflow's own server, with its database in a folder."""
    port = free_port()
    argv = [sys.executable, "-m", "mlflow", "server", f"--port={port}", "--workers=1"]
    argv += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db"]
    argv += [f"--artifacts-destination={folder}/artifacts"]
    address = f"http://127.0.0.1:{port}"
    # Eight processes of 250 MB each that do nothing for a run.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(argv, cwd=folder, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            wait_until(lambda: _answers(address))
            yield address
        finally:
            # Its workers end with it.
            process.send_signal(signal.SIGINT)


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health") as answer:
        return answer.status == 200
    return False
