"""What vLLM says to prompts, in an environment of its own, and whether it is what we say."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np

from stem_jax.checkpoints.loading import load_run
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling

PYTHON = os.environ.get("STEM_VLLM_PYTHON")
TOKENS = 32  # of each completion
# Of the two best logits, below which either may be drawn.
CLOSE = 1e-4

# Of each prompt: tokens, and how far each one's logit is above the next.
Tokens = list[list[tuple[int, float]]]


def greedy(folder: Path, prompts: list[list[int]]) -> Tokens:
    """Tokens of `Generator`, past its stops."""
    run = load_run(folder / "run")
    # Its tokenizer has the stops.
    generator = Generator(run.config, run.params, run.rows, None, run.mesh)
    steps = [*generator.steps(prompts, TOKENS, Sampling(0.0, 0, 1.0))]
    return [[(step[number], np.inf) for step in steps] for number in range(len(prompts))]


def environment(folder: Path, plugins: str) -> dict[str, str]:
    """Of processes of vLLM, which load these of its plugins."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": plugins,
        "HF_HOME": str(folder / "hf"),
    }


def vllm(folder: Path, prompts: list[list[int]], plugins: str, **llm) -> dict:
    """What offline.py says to the prompts. llm: arguments of vLLM's `LLM`."""
    job, answer = folder / "job.json", folder / "answer.json"
    job.write_text(json.dumps({"llm": llm, "prompts": prompts, "tokens": TOKENS}))
    subprocess.run(
        [PYTHON, Path(__file__).with_name("offline.py"), job, answer],
        env=environment(folder, plugins),
        check=True,
        timeout=1200,
    )
    return json.loads(answer.read_text())


def check_equal(ours: Tokens, theirs: Tokens) -> None:
    """Token by token, up to a place where their two best are within `CLOSE`, which is printed."""
    assert len(ours) == len(theirs)
    wrong = []
    for number, (a, b) in enumerate(zip(ours, theirs)):
        assert len(a) == len(b)
        for place, ((token, _), (other, margin)) in enumerate(zip(a, b)):
            if token != other:
                print(f"prompt {number}, token {place}: {token}, {other}, margin {margin:.2e}")
                wrong += [number] if margin > CLOSE else []
                break
    assert not wrong
