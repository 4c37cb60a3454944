"""launch/tpu_pod.sh against a stand-in gcloud: machines, setup, arguments, and what it refuses."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stem_jax.errors import InputError
from stem_jax.storage import place
from tests.children import ROOT
from tests.launching import STAND_INS
from tests.pod import SCRIPT, SHAPE, WORKDIR


def test_scripts_are_clean():
    scripts = sorted([*(ROOT / "launch").glob("*.s*"), *STAND_INS.glob("*.sh")])
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, check=True)


def test_create_waits_until_the_machines_are_there(pod):
    states = "CREATING WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    _, err = pod.run("create", *SHAPE, "--project=my-project", GCLOUD_STATES=states)
    [call] = pod.called("queued-resources", "create")
    assert call[4:] == [
        "pod",
        "--node-id=pod",
        "--zone=zone-a",
        "--project=my-project",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    ]
    said = re.findall("pod in zone-a is ([A-Z_]+)$", err, re.MULTILINE)
    assert said == ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]
    assert (
        "v5litepod-16 pod in zone-a is READY and billed; delete it with: "
        "launch/tpu_pod.sh delete --name=pod --zone=zone-a --project=my-project" in err
    )
    # A second time it asks for no second one.
    pod.run("create", *SHAPE)
    assert len(pod.called("queued-resources", "create")) == 1
    out, _ = pod.run("status")
    assert out.splitlines() == [
        "pod in zone-a: READY, 2 workers answer",
        "worker 0: new ",
        "worker 1: new ",
    ]


@pytest.mark.parametrize(
    ("flags", "track", "expected"),
    [
        (["--reserved"], [], ["--reserved"]),
        (["--reserved", "--valid-until=6h"], [], ["--reserved", "--valid-until-duration=6h"]),
        # As https://docs.cloud.google.com/tpu/docs/consume-reservation has it.
        (["--reservation=ours"], ["alpha"], ["--reservation=ours"]),
    ],
)
def test_machines_of_a_reservation(pod, flags, track, expected):
    out, _ = pod.run("create", "--dry-run", *SHAPE[:2], *flags)
    assert f"+ gcloud {' '.join([*track, 'compute'])} tpus queued-resources create pod" in out
    pod.run("create", *SHAPE[:2], *flags)
    [call] = [call for call in pod.calls() if "create" in call]
    assert call[: len(track)] == track
    assert call[len(track) :][4:] == [
        *("pod", "--node-id=pod", "--zone=zone-a", "--accelerator-type=v5litepod-16"),
        *("--runtime-version=v2-alpha-tpuv5-lite", *expected),
    ]


def test_create_by_topology_that_fails(pod):
    flags = ["--type=v4", "--topology=2x2x2", "--runtime-version=tpu-ubuntu2204-base"]
    _, err = pod.run("create", *flags, code=1, GCLOUD_STATES="PROVISIONING FAILED")
    [call] = pod.called("queued-resources", "create")
    assert call[7:] == ["--type=v4", "--topology=2x2x2", "--runtime-version=tpu-ubuntu2204-base"]
    assert "error: pod will not become ready" in err
    assert "v4 pod in zone-a is FAILED and may be billed; delete it with: " in err


def test_setup_copies_the_working_tree(ready):
    assert (ready.state / "workers" / "1" / "stem_jax" / "code" / "stem_jax" / "train.py").exists()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = {path for path in listed if (ROOT / path).exists()}
    for number in "01":
        home = ready.state / "workers" / number
        code = home / "stem_jax" / "code"
        found = {str(p.relative_to(code)) for p in code.rglob("*") if p.is_symlink() or p.is_file()}
        assert found == expected
        [range_] = re.findall("^jax(.*)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
        assert (home / "pip.txt").read_text().splitlines() == [
            "install",
            "--quiet",
            "-r",
            "code/requirements.txt",
            f"jax[tpu]{range_}",
        ]
    out, _ = ready.run("status")
    assert out.splitlines() == [
        "pod in zone-a: READY, 2 workers answer",
        "worker 0: idle ",
        "worker 1: idle ",
    ]


def test_setup_clones_where_python_is_too_old(pod, tmp_path):
    source = tmp_path / "source"
    git = ["git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "--quiet", source], check=True)
    (source / "requirements.txt").write_text("jax>=1,<2\nflax\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    subprocess.run([*git, "tag", "v1"], check=True)
    (source / "requirements.txt").unlink()
    subprocess.run([*git, "commit", "--quiet", "-a", "-m", "two"], check=True)
    pod.run("create", *SHAPE)
    command = 'echo "it\'s  $HOME" >~/mounted'
    for _ in range(2):
        pod.run(
            "setup",
            f"--repo=file://{source}",
            "--ref=v1",
            f"--setup-command={command}",
            GCLOUD_OLD_PYTHON="1",
        )
    for number in "01":
        home = pod.state / "workers" / number
        assert (home / "stem_jax" / "code" / "requirements.txt").exists()
        assert "jax[tpu]>=1,<2" in (home / "pip.txt").read_text().splitlines()
        assert (home / "mounted").read_text() == f"it's  {home}\n"
    _, err = pod.run("setup", "--repo=/nowhere", code=1)
    assert "error: setup failed on a worker of pod" in err


def test_arguments_arrive_as_given(ready):
    odd = [
        "--config=configs/tiny.py",
        "--config.train.name=two  words=x",
        "--quotes='\"`",
        "--shell=$HOME $(false) ${x} *?[a] ~ ! # ; & | < > \\ \\n",
        "--lines=one\n  two\n",
        "--tab=\t.",
        "",
        "--ümlaut=ä→",
    ]
    ready.plan.write_text(json.dumps({"0": ["complete"], "1": ["complete"]}))
    ready.run(
        "train",
        "--env=A=b c='$d'\"\n\\",
        "--env=EMPTY=",
        "--coordinator-port=1234",
        "--",
        f"--plan={ready.plan}",
        WORKDIR,
        *odd,
    )
    assert sorted(start["process"] for start in ready.starts()) == ["0", "1"]
    for start in ready.starts():
        assert start["argv"] == [
            *["-m", "stem_jax.train", "--multihost", f"--plan={ready.plan}", WORKDIR],
            *odd,
        ]
        assert start["environment"]["A"] == "b c='$d'\"\n\\"
        assert start["environment"]["EMPTY"] == ""
        assert start["environment"]["JAX_COORDINATOR_PORT"] == "1234"
        assert start["environment"]["PYTHONUNBUFFERED"] == "1"
        assert start["folder"].endswith(f"workers/{start['process']}/stem_jax/code")


def test_train_needs_a_slice_with_code(pod):
    _, err = pod.train({}, code=1)
    assert (
        "error: there is no pod in zone-a; launch/tpu_pod.sh create --name=pod --zone=zone-a" in err
    )
    assert "billed" not in err
    pod.run("create", *SHAPE)
    _, err = pod.train({}, code=1)
    assert "error: no code on pod yet; launch/tpu_pod.sh setup --name=pod --zone=zone-a" in err


def test_delete_asks(pod):
    pod.run("create", *SHAPE)
    _, err = pod.run("delete", code=2)
    assert "give --yes" in err and "is READY and billed" in err
    _, err = pod.run("delete", "--yes")
    assert "pod in zone-a is not there, and costs nothing" in err
    [call] = pod.called("queued-resources", "delete")
    assert call[4:] == ["pod", "--zone=zone-a", "--force", "--quiet"]


def test_status_lists_without_a_name(pod):
    pod.run("create", *SHAPE)
    out = subprocess.run(
        [SCRIPT, "status", "--zone=zone-a"], env=pod.environment, capture_output=True, text=True
    ).stdout
    assert out == "pod zone-a ACTIVE\n"


def test_dry_run_calls_nothing(pod):
    """It prints commands for a shell, which are those that it would run."""

    def commands(command: str, *flags: str) -> list[list[str]]:
        out, _ = pod.run(command, "--dry-run", *flags)
        lines = re.split(r"^\+ ", out, flags=re.MULTILINE)[1:]
        return [shlex.split(bash_unquoted(line)) for line in lines]

    def verbs(calls: list[list[str]]) -> list[str]:
        assert all(call[:3] == ["gcloud", "compute", "tpus"] for call in calls)
        return [" ".join(call[3:5]) for call in calls]

    assert verbs(commands("create", *SHAPE))[0] == "queued-resources create"
    assert verbs(commands("setup")) == ["tpu-vm scp", "tpu-vm ssh"]
    training = commands("train", "--", WORKDIR, "--config=a b's")
    assert verbs(training)[:3] == [
        "queued-resources describe",
        "tpu-vm describe",
        "tpu-vm describe",
    ]
    starting = [call for call in training if "worker_start stem_jax" in " ".join(call)]
    assert len(starting) == 1 and "--worker=all" in starting[0]
    [command] = [part for part in starting[0] if part.startswith("--command=")]
    assert command.rstrip().endswith(
        "-m stem_jax.train --multihost --workdir=/shared/run --config=a\\ b\\'s"
    )
    assert verbs(commands("stop"))[0] == "tpu-vm ssh"
    assert verbs(commands("logs")) == ["tpu-vm ssh"]
    assert "tpu-vm ssh" in verbs(commands("status"))
    assert verbs(commands("delete")) == ["queued-resources delete"]
    assert not pod.calls()


@pytest.mark.parametrize("address", ["s3:x", "gs:/b/run", "S3A://b/run", "s3://", "gs:///run"])
def test_an_address_is_refused_as_the_programs_refuse_it(pod, address):
    with pytest.raises(InputError) as refused:
        place(address, "--workdir")
    said = re.sub(", or ./.* for a path by that name$", "", str(refused.value))
    _, err = pod.run("train", "--dry-run", "--", f"--workdir={address}", code=1)
    assert err == f"tpu_pod (dry run): error: {said}\n"


def bash_unquoted(line: str) -> str:
    """The line with bash's $'...' as Python's shlex reads it."""
    out = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    ).stdout
    return shlex.join(out.split("\0")[:-1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["launch"], "no command 'launch'"),
        (["train", "--name=a", "--zone=b", "--config=c"], "unknown flag --config"),
        (["train", "--name=a", "--zone=b", "stem"], "training flags go behind --"),
        (["train", "--name=a"], "--zone is missing"),
        (["train", "--zone=a"], "--name is missing"),
        (["train", "--name=a", "--zone"], "--zone needs a value"),
        (["train", "--name=a", "--zone=b", "--retries=1"], "needs --type and --runtime-version"),
        (["train", "--name=a", "--zone=b", "--retries=x"], "--retries=x"),
        (["train", "--name=a", "--zone=b", "--env=x"], "--env=x is not NAME=VALUE"),
        (["train", "--name=a", "--zone=b", "--poll=."], "--poll=. must be numbers"),
        (["train", "--name=a", "--zone=b", "--coordinator-port=x"], "--coordinator-port=x and"),
        (["train", "--name=a", "--zone=b", "--", "--config=c"], "give -- --workdir=/SHARED/RUN"),
        (
            ["train", "--name=a", "--zone=b", "--", "--workdir=runs/x"],
            "--workdir=runs/x is not absolute",
        ),
        (["train", "--name=a", "--zone=b", "--", "--workdir", "x"], "--workdir=x is not absolute"),
        (
            ["train", "--name=a", "--zone=b", "--", "--workdir=/x", "--workdir=~/x"],
            "--workdir=~/x is not absolute",
        ),
        (["train", "--name=a", "--zone=b", "--program=x"], "--program=x is none of stem_jax's"),
        (["create", "--name=a", "--zone=b", "--spot", "--reserved"], "--spot and a reservation"),
        (["logs", "--name=a", "--zone=b", "--worker=x"], "--worker=x must be a number, or all"),
        (["setup", "--name=a", "--zone=b", "--folder=/x"], "--folder=/x must be a name"),
        (["create", "--name=a", "--zone=b"], "create needs --type and --runtime-version"),
    ],
)
def test_wrong_flags(pod, flags, message):
    done = subprocess.run([SCRIPT, *flags], env=pod.environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[0]
    assert not [call for call in pod.calls() if "describe" not in call]


def test_help_and_missing_gcloud(pod, tmp_path):
    out, _ = pod.run("--help")
    assert "create" in out and "set -euo" not in out
    (tmp_path / "few").mkdir()
    for tool in ("bash", "dirname"):
        (tmp_path / "few" / tool).symlink_to(shutil.which(tool))
    _, err = pod.run("status", code=1, PATH=str(tmp_path / "few"))
    assert "there is no gcloud; get it from https://cloud.google.com/sdk" in err
