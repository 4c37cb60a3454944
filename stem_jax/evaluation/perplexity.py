"""Bits per byte of texts: by corpus, and by how much of the context a token could see."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.data.coverage import coverage_note, coverage_of
from stem_jax.data.formats import Reading
from stem_jax.data.prepare import open_stores
from stem_jax.data.sources import is_store_folder, read_sources
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.data.trained_pairs import PairCounts
from stem_jax.errors import BadRecord, InputError
from stem_jax.evaluation.frequency import FrequencySums, frequency_lines
from stem_jax.evaluation.limits import check_limit
from stem_jax.evaluation.progress import bars_off
from stem_jax.evaluation.scoring import Scorer
from stem_jax.evaluation.tally import Tally, number, token_bytes
from stem_jax.training.run_data import reading_of

# Ids with bos and eos, UTF-8 bytes of the text, those that no token stands for, the first of these.
_Measured = tuple[list[int], int, float, str]
# So many at a time are sorted by length; what is kept of them in memory is small.
_GROUP = 1024


def perplexity(
    run: LoadedRun,
    sources: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    reading: Reading | None = None,
    counts: PairCounts | None = None,
    by_document: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores texts as training does: every token of a document but its bos, and its eos.

    A document that is longer than the context is cut into windows that follow each other; the
    first token of a window is the last of the one before, so each token is scored once.

    Args:
        sources: built-in corpora, file patterns, or folders of token stores, of which the
            validation documents are read if there are any.
        limit: documents of each source; None: all.
        batch_size: windows at a time.
        reading: of files; None: as the run reads its own.
        counts: how often the run was trained on each id, for figures by that.
        by_document: give the figures of each document, too.
        progress: draw bars on stderr, if it is a terminal.

    Returns:
        `context`, and for each source under `corpora` the record of a `Tally`, its documents, under
        `left_out` the share of its bytes that no token stands for and the first such character, and
        under `by_position` the records of tokens by the number of tokens before them in their
        window, `first` to `last`, with powers of two as the last. There the bytes are those of the
        decoded tokens. With `counts`, under `by_frequency` the groups of `frequency_groups` by the
        input token and by the target, with these bytes. With `by_document`, under that name lists
        of the `nats` and `bytes` of each document, in order.

    Raises:
        InputError: a source that cannot be opened or has no text, before any is scored; or a file
            with a document that cannot be read, when its turn comes.
    """
    check_limit(limit, "documents")
    scorer = Scorer(run, batch_size)
    # The first document of each is read before any is scored: else a name that is wrong would be
    # refused after hours. A mistake further down in a file is found when its turn comes.
    reading = reading or reading_of(run.config.data)
    opened = {source: _opened(source, run, reading) for source in sources}
    corpora = {}
    for source, documents in opened.items():
        documents = itertools.islice(documents, limit)
        bar = tqdm(documents, desc=source, unit=" documents", disable=bars_off(progress))
        frequency = None if counts is None else FrequencySums(counts)
        corpora[source] = _measure(scorer, run.tokenizer, bar, frequency, by_document)
    return {"context": scorer.context, "corpora": corpora}


def format_perplexity(result: dict[str, Any]) -> str:
    """Two tables: the corpora, and bits per byte by position."""
    corpora = result["corpora"]
    width = max(map(len, [*corpora, "tokens before"]))
    lines = [f"{'corpus':<{width}}  bits/byte  nats/token  perplexity      tokens       bytes"]
    for name, record in corpora.items():
        lines.append(
            f"{name:<{width}}  {number(record['bits_per_byte']):>9}  "
            f"{number(record['loss']):>10}  {number(record['perplexity']):>10}  "
            f"{record['tokens']:>10,}  {record['bytes']:>10,}"
        )
    columns = [max(len(name), 9) for name in corpora]
    heads = "  ".join(f"{name:>{n}}" for name, n in zip(corpora, columns, strict=True))
    lines += ["", f"{'tokens before':<{width}}  {heads}  (bits per byte)"]
    tables = [record["by_position"] for record in corpora.values()]
    for rows in itertools.zip_longest(*tables):
        row = next(row for row in rows if row is not None)
        label = (
            f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        )
        values = (number(row["bits_per_byte"] if row else None) for row in rows)
        cells = "  ".join(f"{value:>{n}}" for value, n in zip(values, columns, strict=True))
        lines.append(f"{label:<{width}}  {cells}")
    for name, record in corpora.items():
        if "by_frequency" in record:
            lines += ["", *frequency_lines(name, record["by_frequency"])]
    for name, record in corpora.items():
        note = coverage_note(record["left_out"], record["left_out_example"])
        lines += ["", f"{name}: {note}"] if note else []
    return "\n".join(lines)


def _opened(source: str, run: LoadedRun, reading: Reading) -> Iterator[_Measured]:
    """`_documents`, of which there is one at least."""
    documents = _documents(source, run, reading)
    first = next(documents, None)
    if first is None:
        raise InputError(f"--perplexity={source} has no text; give another source")
    return itertools.chain([first], documents)


def _documents(source: str, run: LoadedRun, reading: Reading) -> Iterator[_Measured]:
    tokenizer = run.tokenizer
    if is_store_folder(source):
        stores = open_stores(source, tokenizer, run.config.model.vocab_size)
        store = stores.get("validation", stores["train"])
        if store.scored is not None:
            raise InputError(
                f"--perplexity={source} are conversations, of which answers alone are scored: a "
                "run that has them in data.sources validates on them (eval/loss)"
            )
        for index in range(store.num_documents):
            size = int(store.document_bytes[index])
            # Of all its documents alike: nobody knows of which.
            lost = store.meta.left_out * size, store.meta.left_out_example
            yield store.document_ids(index).tolist(), size, *lost
        return
    if Path(source).is_dir():
        raise InputError(
            f"--perplexity={source} is a folder without train/meta.json; give a file pattern or a "
            "folder that prepare wrote"
        )
    for document in read_sources([source], reading):
        if document.text:
            try:
                ids = tokenizer.encode_document(document.text)
            except BadRecord as error:
                raise InputError(f"--perplexity={source}: {document.origin}: {error}") from error
            found = coverage_of(tokenizer, document.text, ids)
            ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
            yield ids, found.text, found.left_out, found.example


def _measure(
    scorer: Scorer,
    tokenizer: Tokenizer,
    documents: Iterable[_Measured],
    frequency: FrequencySums | None,
    by_document: bool,
) -> dict[str, Any]:
    """The record of one source."""
    # Bucket b holds the tokens with 2^(b-1) + 1 to 2^b others before them.
    bucket_L = np.ceil(np.log2(np.arange(1, scorer.context + 1))).astype(int)
    total, buckets = Tally(), [Tally() for _ in range(bucket_L[-1] + 1)]
    count, left_out, example = 0, 0.0, ""
    of_documents: dict[str, list[float]] = {"nats": [], "bytes": []}

    def windows() -> Iterator[tuple[list[int], list[int], int]]:
        nonlocal count, left_out, example
        for ids, num_bytes, lost, first in documents:
            count += 1
            left_out += lost
            example = example or first
            total.bytes += num_bytes
            if by_document:
                of_documents["nats"].append(0.0)
                of_documents["bytes"].append(num_bytes)
            bytes_of = token_bytes(tokenizer, ids)
            for start in range(0, len(ids) - 1, scorer.context):
                end = start + scorer.context + 1
                yield ids[start:end], bytes_of[start + 1 : end], count - 1

    for group in _groups(windows()):
        ids, sizes_of_all, places = zip(*group, strict=True)
        scored = scorer.score(ids)
        nats_of_all = [-scores.log_likelihoods.astype(np.float64) for scores in scored]
        if frequency is not None:
            frequency.add(ids, nats_of_all, sizes_of_all)
        for nats, sizes, place in zip(nats_of_all, sizes_of_all, places, strict=True):
            n = len(sizes)
            if by_document:
                of_documents["nats"][place] += float(nats.sum())
            nats_B = np.bincount(bucket_L[:n], nats)
            tokens_B = np.bincount(bucket_L[:n])
            bytes_B = np.bincount(bucket_L[:n], sizes)
            for bucket, *sums in zip(buckets, nats_B, tokens_B, bytes_B):
                bucket.nats += float(sums[0])
                bucket.tokens += int(sums[1])
                bucket.bytes += int(sums[2])
    total.nats = math.fsum(bucket.nats for bucket in buckets)
    total.tokens = sum(bucket.tokens for bucket in buckets)
    by_position = [
        {"first": (1 << b) // 2 + 1, "last": min(1 << b, scorer.context), **bucket.record()}
        for b, bucket in enumerate(buckets)
        if bucket.tokens
    ]
    lost = {"left_out": left_out / total.bytes, "left_out_example": example}
    record = {**total.record(), "documents": count, **lost, "by_position": by_position}
    record |= {} if frequency is None else {"by_frequency": frequency.record()}
    return record | ({"by_document": of_documents} if by_document else {})


def _groups(items: Iterator[Any]) -> Iterator[list[Any]]:
    while group := list(itertools.islice(items, _GROUP)):
        yield group
