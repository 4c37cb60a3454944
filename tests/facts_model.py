"""A small model that knows 14 countries, committed as an export: training takes minutes.

    python -m tests.facts_model

trains it anew and writes tests/data/facts_model/.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from stem_jax import export, import_torch
from stem_jax.data import facts
from stem_jax.editing import cases as edit_cases
from stem_jax.evaluation import recall
from stem_jax.interop.hf_export import CODE_FILES

COUNTRIES = (
    """Spain Germany Japan Brazil Canada Egypt Norway Chile Kenya Peru Hungary Samoa""".split()
)
COUNTRIES += ["New Zealand", "South Korea"]
FOLDER = Path(__file__).parent / "data" / "facts_model"
_SHUFFLES = 40
_FLAGS = {
    "model.vocab_size": 704,
    "model.embed_dim": 64,
    "model.ffn_dim": 128,
    # So small a model needs it for edits to take.
    "model.token_embedding_dropout": 0.3,
    "train.steps": 900,
    "train.global_batch_size": 16,
    "checkpoint.every": 0,
}


def only_some_countries(patch: pytest.MonkeyPatch) -> None:
    """Makes corpus, questions and edits know of COUNTRIES alone."""
    some = [fact for fact in facts.read_facts() if fact.country in COUNTRIES]
    assert len(some) == len(COUNTRIES)
    for module in (facts, recall, edit_cases):
        patch.setattr(module, "read_facts", lambda: some)


def import_into(workdir: Path) -> None:
    """Makes a work folder of the committed model."""
    import_torch.main(["--from=hf", f"--path={FOLDER}", f"--workdir={workdir}"])


def export_into(folder: Path) -> Path:
    """Makes a work folder and an export for transformers of the committed model; the latter."""
    import_into(folder / "run")
    export.main([f"--workdir={folder / 'run'}", f"--out={folder / 'out'}", "--format=hf"])
    return folder / "out"


def _train(workdir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        only_some_countries(patch)
        texts = []
        # So few documents would be learned by heart, and no fact without its neighbours.
        for seed in range(_SHUFFLES):
            patch.setattr(facts, "_SEED", seed)
            texts += [json.dumps({"text": text}) for text in facts.read_fact_documents()]
    source = workdir / "facts.jsonl"
    source.write_text("\n".join(texts) + "\n")
    command = [sys.executable, "-m", "stem_jax.train", "--config=configs/facts.py"]
    command += [f"--workdir={workdir}", f"--config.data.sources={source}"]
    subprocess.run([*command, *(f"--config.{k}={v}" for k, v in _FLAGS.items())], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        _train(Path(folder))
        flags = ["--format=hf", "--dtype=bfloat16", f"--out={FOLDER}"]
        export.main([f"--workdir={folder}", *flags])
    # No second copy of the code; an import reads the rest.
    for name in (*CODE_FILES, "generation_config.json"):
        (FOLDER / name).unlink()
