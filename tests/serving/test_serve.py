"""The program itself: a process, its clients, and how SIGTERM ends it."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from stem_jax import cli, serve
from stem_jax.checkpoints.loading import load_run
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.serving.flags import KEY_VARIABLE
from stem_jax.serving.http_server import bound_socket
from tests import saved_models

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def workdir(train_step, make_batch, tmp_path_factory):
    return saved_models.run_folders({"stem": {}}, train_step, make_batch, tmp_path_factory)("stem")


@contextlib.contextmanager
def started(workdir, *flags, **environment):
    """A server that has said where it is: its process, address, and lines of standard error."""
    command = [sys.executable, "-m", "stem_jax.serve", f"--workdir={workdir}", "--port=0"]
    process = subprocess.Popen(
        [*command, "--slots=4", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: queue.Queue[str] = queue.Queue()
    errors: list[str] = []
    threads = [
        threading.Thread(target=lambda: [said.put(line) for line in process.stdout]),
        threading.Thread(target=lambda: errors.extend(process.stderr)),
    ]
    for thread in threads:
        thread.start()
    try:
        assert said.get(timeout=300).startswith("compiling for 4 slots of 128 tokens")
        where = said.get(timeout=300).split()
        assert where[:3] == ["serving", workdir.name, "at"], errors
        yield process, where[3], errors
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)
        for thread in threads:
            thread.join(60)
        process.stdout.close()
        process.stderr.close()


def _ended(process, errors) -> tuple[int, list[str]]:
    return process.wait(120), [line for line in errors if "stub" not in line and "absl" not in line]


@pytest.mark.long
@pytest.mark.little_effort
def test_a_server_answers_as_generate_does_and_ends_by_sigterm(workdir):
    run = load_run(workdir)
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    with started(workdir, **{KEY_VARIABLE: "k"}) as (process, address, errors):
        name = workdir.name
        programs = [_metric(address, "stem_compiled_programs")]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0) as client:
            asked = {"model": name, "prompt": ["abc", "one more."], "max_tokens": 12}
            for temperature, seed in ((0, None), (3.0, 5)):
                how = Sampling(float(temperature), 0, 1.0)
                expected = [c.text for c in generator.complete(asked["prompt"], 12, how, seed or 0)]
                settings = {**asked, "temperature": temperature, "seed": seed}
                found = client.completions.create(**settings)
                assert [choice.text for choice in found.choices] == expected
                texts = ["", ""]
                for chunk in client.completions.create(**settings, stream=True):
                    for choice in chunk.choices:
                        texts[choice.index] += choice.text
                assert texts == expected
            with pytest.raises(openai.BadRequestError, match="chat template"):
                client.chat.completions.create(
                    model=name, messages=[{"role": "user", "content": "hi"}]
                )
        programs.append(_metric(address, "stem_compiled_programs"))
        assert programs[0] == programs[1] > 0
        answers = []
        body = {"model": name, "prompt": "abc", "max_tokens": 120, "n": 16}
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{address}/v1/completions", json=body, headers=_key("k"), timeout=300)
            )
        )
        thread.start()
        while not _metric(address, "stem_running"):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        thread.join(300)
        assert len(answers[0].json()["choices"]) == 16
        assert _ended(process, errors) == (0, [])


@pytest.mark.long
@pytest.mark.little_effort
def test_a_second_sigterm_does_not_wait(workdir):
    with started(workdir, "--host=0.0.0.0") as (process, address, errors):
        body = {"model": workdir.name, "prompt": "abc", "max_tokens": 120, "n": 64}
        with httpx.Client(base_url=address, timeout=300) as client:
            thread = threading.Thread(target=lambda: _quiet(client, body))
            thread.start()
            while not _metric(address, "stem_running"):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            code, said = _ended(process, errors)
            thread.join(60)
    assert code == 0
    assert said[0].startswith("note: whoever reaches 0.0.0.0 may use it")
    assert said[1:] == ["note: 1 requests were cut off\n"]


@pytest.mark.long
@pytest.mark.little_effort
def test_sigterm_while_it_compiles(workdir):
    with bound_socket("127.0.0.1", 0) as own:
        port = own.getsockname()[1]
    flags = [f"--workdir={workdir}", f"--port={port}", "--no-compilation-cache"]
    with subprocess.Popen(
        [sys.executable, "-m", "stem_jax.serve", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
    ) as process:
        answer = None
        while answer is None:
            assert process.poll() is None
            with contextlib.suppress(httpx.ConnectError):
                answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
            time.sleep(0.01)
        assert answer.status_code == 503 and "compiling" in answer.text
        process.terminate()
        said = process.stdout.read()
        assert process.wait(60) == 0 and b"serving" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=none"], "--workdir=none does not exist"),
        (["--workdir=none", "--host=no such host"], "--host=no such host is no address here"),
    ],
)
def test_refusals_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve", "--port=0", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.run(serve.main)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def _key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _metric(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics", timeout=60).text
    [value] = [line.split()[1] for line in text.splitlines() if line.split()[0] == name]
    return json.loads(value)


def _quiet(client: httpx.Client, body: dict) -> None:
    with contextlib.suppress(httpx.HTTPError):
        client.post("/v1/completions", json=body)
