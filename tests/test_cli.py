"""What all programs share: flags come first, usage lines, refused values, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stem_jax import cli
from stem_jax.errors import InputError

ROOT = Path(__file__).parent.parent
PROGRAMS = ["train", "generate", "edit", "analyze", "evaluate", "export", "import_torch"]
PROGRAMS += ["prepare", "plan", "serve"]
# What takes seconds to import.
HEAVY = ("jax", "flax", "orbax", "grain", "torch", "transformers", "matplotlib")


@pytest.fixture(scope="module")
def helps():
    """{program: (what --help prints, modules that it imported)}."""
    found = {}
    for name in PROGRAMS:
        argv = [sys.executable, "-X", "importtime", "-m", f"stem_jax.{name}", "--help"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        found[name] = (done.stdout, modules)
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_quick(helps, name):
    assert not helps[name][1] & set(HEAVY)


@pytest.mark.parametrize("name", PROGRAMS)
def test_usage_names_the_module_and_no_empty_defaults(helps, name):
    text = helps[name][0]
    assert text.startswith(f"usage: python -m stem_jax.{name} [-h]")
    assert not re.search(r"\(default: (None|False|True|\[.*|)\)", text)
    assert str(ROOT) not in "".join(text.split())


def test_defaults_that_say_something_stay(helps):
    text = " ".join(helps["generate"][0].split())
    assert "0 is greedy (default: 0.8)" in text and "of the samples (default: 0)" in text
    text = " ".join(helps["evaluate"][0].split())
    assert "0 is the beginning (default: 0.0,0.25,0.5,0.75,1.0)" in text


def test_flags_may_be_written_with_underscores():
    parser = cli.Parser("stem_jax.x", None)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--prompt")
    args = parser.parse_args(["--max_new_tokens=3", "--prompt", "a_b=c_d"])
    assert (args.max_new_tokens, args.prompt) == (3, "a_b=c_d")
    assert parser.parse_args(["--max_new_tokens", "4"]).max_new_tokens == 4


def test_a_path_flag_refuses_an_address_and_knows_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = cli.Parser("stem_jax.x", None)
    parser.add_path("--out")
    parser.add_paths("--edits", default=[])
    args = parser.parse_args(["--out=~/a", "--edits=b, ~/c"])
    assert [args.out, *args.edits] == [Path("/home/me/a"), Path("b"), Path("/home/me/c")]
    for flag in ("--out=gs://b/x", "--edits=a,gs://b/x"):
        with pytest.raises(InputError, match=f"{flag[:5]}.*=gs://b/x is an address"):
            parser.parse_args([flag])


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--config=configs/tiny.py", "--workdir=gs:b/run"],
        ["generate", "--workdir=s3:b/run", "--prompt=a"],
        ["generate", "--workdir=x", "--prompt=a", "--out=s3:b/x"],
        ["serve", "--workdir=hdfs://b/run"],
        ["serve", "--workdir=x", "--chat-template=gs://b/t"],
        ["prepare", "--input=README.md", "--tokenizer=bytes", "--out=hf://b/s"],
        ["prepare", "--verify", "--out=gs://b/s"],
        ["prepare", "--input", "README.md", "hf://b/t", "--tokenizer=bytes", "--out=x"],
        ["evaluate", "--workdir=x", "--perplexity=facts,gs://b/t"],
        ["evaluate", "--workdir=x", "--tasks=hf://b/t"],
        ["edit", "--workdir=x", "--measure=gs://b/t.json"],
        ["edit", "--workdir=x", "--swap=a=>b", "--save=az://b/t"],
        ["analyze", "--workdir=x", "--out=hdfs://b"],
        ["export", "--workdir=x", "--format=hf", "--out=az://b"],
        ["import_torch", "--from=hf", "--path=az://some/model", "--workdir=x"],
        ["plan", "--config=gs://b/tiny.py", "--topology=cpu:8"],
    ],
)
def test_programs_refuse_addresses_and_make_nothing(argv, tmp_path, monkeypatch, capsys):
    name, *flags = argv
    main = __import__(f"stem_jax.{name}", fromlist=["main"]).main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1
    assert error.startswith("error: --") and "is an address" in error
    assert list(tmp_path.iterdir()) == []


def test_overrides_are_separated():
    argv = ["--a=1", "--config.train.steps=5", "--config.data.folder", "x=y", "--b"]
    assert cli.split_overrides(argv) == (
        ["--a=1", "--b"],
        {"train.steps": "5", "data.folder": "x=y"},
    )
    # Written with an equals sign it is meant.
    assert cli.split_overrides(["--config.train.sample_prompt=--x"])[1] == {
        "train.sample_prompt": "--x"
    }


def test_an_override_without_a_value_does_not_take_the_next_flag():
    with pytest.raises(InputError, match=r"--config.data.folder needs .* --workdir=x is a flag"):
        cli.split_overrides(["--config.data.folder", "--workdir=x"])
    with pytest.raises(InputError, match=r"--config.data.folder needs a value: --config"):
        cli.split_overrides(["--config.data.folder"])


def _interrupted(program: str, *signals: int) -> subprocess.CompletedProcess:
    """Runs Python code that prints `ready` before it waits to be interrupted, each time."""
    argv = [sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=ROOT, **pipes) as child:
        for number in signals:
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.2)
            child.send_signal(number)
        output, error = child.communicate(timeout=60)
    return subprocess.CompletedProcess(argv, child.returncode, output, error)


_MAIN = """
import os, sys, threading, time
from stem_jax import cli
def main(argv):
    print("ready", flush=True)
    {body}
cli.run(main)
"""


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        # A thread that does not end would keep the interpreter.
        "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",
        # A library that makes another exception of it.
        "exec('try:\\n time.sleep(60)\\nexcept BaseException as e:\\n raise ValueError(7) from e')",
    ],
)
def test_ctrl_c_ends_a_program_in_one_line(body):
    done = _interrupted(_MAIN.format(body=body), signal.SIGINT)
    # Ended by the signal: a shell's loop around it ends, too.
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_a_second_ctrl_c_does_not_wait():
    again = 'print("ready", flush=True)'
    body = f"exec('try:\\n time.sleep(60)\\nfinally:\\n {again}\\n time.sleep(60)')"
    done = _interrupted(_MAIN.format(body=body), signal.SIGINT, signal.SIGINT)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_a_program_in_the_background_ignores_ctrl_c_as_before():
    program = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = _interrupted(program + _MAIN.format(body="time.sleep(1)"), signal.SIGINT)
    assert (done.returncode, done.stderr) == (0, "")


def test_libtpu_is_not_asked_where_there_is_no_tpu():
    pytest.importorskip("libtpu")
    if list(Path("/dev").glob("accel*")) or list(Path("/dev").glob("vfio/[0-9]*")):
        pytest.skip("this machine may have a TPU")
    program = "from stem_jax.jax_start import start_jax; start_jax(); import jax; jax.devices()"
    names = [name for name in os.environ if name.startswith(("TPU_", "LIBTPU_", "JAX_PLATFORMS"))]
    environment = {name: value for name, value in os.environ.items() if name not in names}
    argv = [sys.executable, "-c", program]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(argv, timeout=120, **options)
    assert (done.returncode, done.stderr) == (0, "")


_IN_A_CALLBACK = """
import gc, os, signal, time
from stem_jax import cli
def collected(phase, info):
    if phase == "stop":
        gc.callbacks.clear()
        os.kill(os.getpid(), signal.SIGINT)
def main(argv):
    gc.callbacks.append(collected)
    gc.collect()
    time.sleep(60)
cli.run(main)
"""


def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector():
    """jax has one, and Python only prints what is raised there."""
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_CALLBACK], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")
