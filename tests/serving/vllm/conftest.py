"""A trained model with heads of 32, its export, prompts, and what we say to them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stem_jax.checkpoints.loading import load_run
from tests.children import ROOT
from tests.serving.vllm.answers import Tokens, greedy

PROMPTS = 64


def _run(*argv: str) -> None:
    subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, check=True)


def _trained(folder: Path, *flags: str) -> Path:
    """A folder with `run` and its `export`."""
    _run(
        "stem_jax.train",
        "--config=configs/tiny.py",
        f"--workdir={folder / 'run'}",
        "--config.eval.every=0",
        "--config.eval.max_batches=1",
        "--config.eval.baselines=False",
        *flags,
    )
    export = ("--format=hf", f"--out={folder / 'export'}")
    _run("stem_jax.export", f"--workdir={folder / 'run'}", *export)
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    return _trained(tmp_path_factory.mktemp("vllm"), "--config.train.steps=60")


@pytest.fixture(scope="session", params=("gate", "up_add"))
def other_site(request, tmp_path_factory) -> Path:
    """Also with tied embeddings and scaled positions."""
    return _trained(
        tmp_path_factory.mktemp(request.param),
        "--config.train.steps=30",
        f"--config.model.stem_site={request.param}",
        "--config.model.tie_embeddings=True",
        "--config.model.rope_scaling=llama3",
        "--config.model.rope_factor=4",
        "--config.model.rope_original_len=64",
    )


@pytest.fixture(scope="session")
def memory(request, tmp_path_factory) -> Path:
    """With rows of another memory than STEM's, its parameter."""
    return _trained(
        tmp_path_factory.mktemp(request.param),
        "--config.train.steps=60",
        "--config.model.stem_layers=none",
        f"--config.{request.param}.layers=0,2",
    )


@pytest.fixture(scope="session")
def prompts(work) -> list[list[int]]:
    """Pieces of our manuals, of 4 to 60 tokens."""
    tokenizer = load_run(work / "run").tokenizer
    text = (ROOT / "docs" / "training.md").read_text() + (ROOT / "docs" / "text.md").read_text()
    random = np.random.default_rng(0)
    found = []
    for _ in range(PROMPTS):
        start = int(random.integers(len(text) - 400))
        ids = tokenizer.encode_prompt(text[start : start + 400])
        found.append([*map(int, ids[: random.integers(4, 61)])])
    return found


@pytest.fixture(scope="session")
def ours(work, prompts) -> Tokens:
    return greedy(work, prompts)
