"""`vllm serve` as people start it, asked by OpenAI's client; what it refuses."""

import contextlib
import subprocess
import time
from pathlib import Path

import openai
import pytest

from tests.children import free_port
from tests.serving.vllm.answers import PYTHON, TOKENS, check_equal, environment

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(PYTHON is None, reason="tests/serving/environment.sh says how"),
]
KNOWN = "served"


def _command(model: Path, *flags: str) -> list[str]:
    served = [str(Path(PYTHON).with_name("vllm")), "serve", str(model)]
    return [*served, "--dtype=float32", f"--served-model-name={KNOWN}", *flags]


@contextlib.contextmanager
def _server(model: Path, folder: Path, *flags: str, plugins: str):
    """A client of a server that is ready."""
    port = free_port()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            _command(model, f"--port={port}", *flags),
            env=environment(folder, plugins),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                while True:
                    assert process.poll() is None, (folder / "log").read_text()[-4000:]
                    with contextlib.suppress(openai.APIConnectionError):
                        client.models.list()
                        break
                    time.sleep(1)
                yield client
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_served(work, prompts, ours, tmp_path):
    """All prompts at once, with the tokenizer of the export and without its code."""
    with _server(work / "export", tmp_path, plugins="stem") as client:
        answer = client.completions.create(
            model=KNOWN,
            prompt=prompts,
            temperature=0,
            max_tokens=TOKENS,
            logprobs=2,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="another", prompt="a")
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=KNOWN, prompt=[10**6])
    theirs = []
    for choice in sorted(answer.choices, key=lambda choice: choice.index):
        margins = []
        for found in choice.logprobs.top_logprobs:
            best = sorted(found.values(), reverse=True)
            # Two tokens of one text are one entry.
            margins.append(best[0] - best[1] if len(best) > 1 else 0.0)
        theirs.append([*zip(choice.token_ids, margins)])
    check_equal(ours, theirs)


@pytest.mark.parametrize(
    "flag", ("--enable-prompt-embeds", "--pipeline-parallel-size=2"), ids=("embeds", "pipeline")
)
def test_refused(flag, work, tmp_path):
    refused = subprocess.run(
        _command(work / "export", flag),
        env=environment(tmp_path, "stem"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert refused.returncode != 0
    assert f"{flag.partition('=')[0]} cannot be" in refused.stdout + refused.stderr
