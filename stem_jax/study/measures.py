"""What a study measures of a finished run; the same bits whenever it is asked."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from stem_jax.checkpoints.loading import LoadedRun, load_run
from stem_jax.data.token_store import TokenStore
from stem_jax.evaluation.like_pieces import KindOf
from stem_jax.evaluation.memorization import NothingAlike, memorization
from stem_jax.evaluation.perplexity import perplexity
from stem_jax.evaluation.recall import NAMES, recall
from stem_jax.evaluation.training_text import open_training_text
from stem_jax.study.curve import curve_of, stability_of
from stem_jax.study.prepared_text import PreparedText

# Sequences at a time: on one core at a study's size, 32 of 256 tokens go fastest.
_BATCH = 32
# Pairs of pieces, a row or less each.
_PAIRS = 512
# What recall calls phrasings, and a study.
_PHRASINGS = {"trained": "told", "held_out": "untold"}


def measure_run(workdir: Path, text: PreparedText | None) -> dict[str, Any]:
    """Measures the newest checkpoint of a run.

    Args:
        text: that it was trained on; None, or one without test documents: the `facts` corpus.

    Returns:
        measures: by name, see `measured`. documents: `nats` and `bytes` of each test document.
        curve: see `curve_of`.

    Raises:
        InputError: a run or a text that cannot be read.
    """
    run = load_run(workdir)
    try:
        tokens_per_step = run.config.tokens_per_step
        curve = curve_of(workdir, tokens_per_step)
        measures = stability_of(workdir, run.config.optimizer.warmup_steps)
        if run.step * tokens_per_step in curve["dev_tokens"][-1:]:
            measures["dev_bits_per_byte"] = curve["dev_bits_per_byte"][-1]
        documents: dict[str, list[float]] = {"nats": [], "bytes": []}
        if text is None or text.test is None:
            measures |= _facts(run)
        else:
            of_test, documents = _test(run, workdir, text, text.test)
            measures |= of_test
    finally:
        run.close()
    return {"measures": measures, "documents": documents, "curve": curve}


def _test(
    run: LoadedRun, workdir: Path, text: PreparedText, test: Path
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What the test documents say, and nats and bytes of each."""
    seen, source = open_training_text(run, workdir), str(test)
    options: dict[str, Any] = {"batch_size": _BATCH, "progress": False}
    whole = perplexity(run, [source], counts=seen.pair_counts(), by_document=True, **options)
    record = whole["corpora"][source]
    measures = {"test_bits_per_byte": record["bits_per_byte"]}
    for side, groups in record["by_frequency"].items():
        for number, group in enumerate(groups):
            # A group of ends of documents alone has no bytes.
            if group["bits_per_byte"] is not None:
                measures[f"{side}_frequency_{number}"] = group["bits_per_byte"]
    held_out = TokenStore.open(test / "train")
    try:
        gap = memorization(
            run, seen, held_out=held_out, kind_of=_kinds(text), limit=_PAIRS, **options
        )
    except NothingAlike:
        # Of a few steps: it has no such measure.
        return measures, record["by_document"]
    measures["memorization_gap"] = gap["gap"]
    for side in ("held_out", "seen"):
        measures[f"memorization_{side}"] = gap[side]["bits_per_byte"]
    return measures, record["by_document"]


def _kinds(text: PreparedText) -> KindOf:
    """The kind of a document: its file's suffix, such as .rst."""
    splits = json.loads(text.documents.read_text(encoding="utf-8"))
    suffixes = {
        split: [PurePosixPath(document["path"]).suffix.lower() for document in documents]
        for split, documents in splits.items()
    }

    def kind_of(store: TokenStore, document: int) -> str:
        of_test = store.folder.parent == text.test
        return suffixes["test" if of_test else "train"][document]

    return kind_of


def _facts(run: LoadedRun) -> dict[str, float]:
    """Shares of all questions that are answered, by phrasing and by tokens of the name."""
    found = recall(run, batch_size=_BATCH, progress=False)["names"]
    shares = {
        f"facts_{told}_{names}": found[names][phrasing]
        for phrasing, told in _PHRASINGS.items()
        for names in NAMES
    }
    return {name: share for name, share in shares.items() if share is not None}
