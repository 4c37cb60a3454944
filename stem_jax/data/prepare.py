"""Documents to token stores, split into train and validation by document."""

import hashlib
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from stem_jax.data.documents import Document
from stem_jax.data.token_store import TokenStore, TokenStoreWriter
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError

SPLITS = ("train", "validation")
# Large enough to feed every thread of the tokenizer, small enough to stay in memory.
_BATCH_DOCUMENTS = 256
_BATCH_CHARS = 4_000_000


def prepare_stores(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    name: str,
    validation_fraction: float,
    seed: int,
    progress: bool,
) -> dict[str, TokenStore]:
    """Writes `out/train` and, unless the fraction is 0, `out/validation`; returns them opened.

    Documents without text are left out. A document's split depends on the seed and its text alone,
    so it stays when others come or go, and copies of it stay together. If a split would be empty,
    the document whose hash is nearest to it moves there.

    validation_fraction: share of the documents, in [0, 1).
    progress: draw a bar (documents, MB, tokens per second) on stderr if it is a terminal.
    Raises InputError for a fraction out of range, a corpus without text, and a single document
    that would have to fill both splits.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction {validation_fraction} must lie in [0, 1)")
    splits = SPLITS if validation_fraction > 0 else SPLITS[:1]
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                TokenStoreWriter(
                    Path(out) / split,
                    vocab_size=tokenizer.vocab_size,
                    fingerprint=tokenizer.fingerprint,
                    bos_id=tokenizer.bos_id,
                    eos_id=tokenizer.eos_id,
                    name=name,
                    split=split,
                )
            )
            for split in splits
        }
        splitter = _Splitter(writers, validation_fraction)
        bar = stack.enter_context(_Progress(name, enabled=progress))
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                raw = document.text.encode()
                splitter.add(_fraction_of(seed, raw), ids, len(raw))
                bar.add(len(raw), len(ids))
        splitter.finish(name)
    stale = Path(out) / "validation"
    if validation_fraction == 0 and (stale / "meta.json").is_file():
        shutil.rmtree(stale)  # an earlier run's; its documents are now trained on
    return open_stores(out, tokenizer)


def open_stores(
    folder: str | Path, tokenizer: Tokenizer, vocab_size: int | None = None
) -> dict[str, TokenStore]:
    """Opens the splits in a folder: "train" always, "validation" if there is one.

    vocab_size: of the model, if there is one. Raises InputError as `TokenStore.open` does.
    """
    found = [s for s in SPLITS if s == "train" or (Path(folder) / s).exists()]
    return {
        split: TokenStore.open(
            Path(folder) / split, fingerprint=tokenizer.fingerprint, vocab_size=vocab_size
        )
        for split in found
    }


class _Splitter:
    """Sends documents to the writers; with two of them, neither stays empty.

    Until both splits have been seen, the document nearest to the missing one is held back. It goes
    there if the corpus ends before a document does.
    """

    def __init__(self, writers: dict[str, TokenStoreWriter], validation_fraction: float):
        self._writers = writers
        self._fraction = validation_fraction
        self._settled = len(writers) == 1
        self._held: tuple[float, Sequence[int], int] | None = None

    def add(self, fraction: float, ids: Sequence[int], num_bytes: int) -> None:
        document = (fraction, ids, num_bytes)
        split = self._split_of(fraction)
        if not self._settled:
            if self._held is None:
                self._held = document
                return
            held_split = self._split_of(self._held[0])
            if held_split != split:
                self._write(held_split, self._held)
                self._held, self._settled = None, True
            elif fraction != self._held[0] and (fraction < self._held[0]) == (split == "train"):
                self._held, document = document, self._held
        self._write(split, document)

    def finish(self, name: str) -> None:
        """Places the held document. Raises InputError if there are too few documents."""
        written = sum(writer.num_documents for writer in self._writers.values())
        if self._held is None and written == 0:
            raise InputError(f"corpus {name!r} has no text: give documents that are not empty")
        if self._held is not None and written == 0:
            raise InputError(
                f"corpus {name!r} has a single document, which cannot be both train and"
                " validation: give more documents or set validation_fraction to 0"
            )
        if self._held is not None:
            split = self._split_of(self._held[0])
            self._write("train" if split == "validation" else "validation", self._held)

    def _split_of(self, fraction: float) -> str:
        return "validation" if fraction < self._fraction else "train"

    def _write(self, split: str, document: tuple[float, Sequence[int], int]) -> None:
        self._writers[split].add(*document[1:])


class _Progress:
    """A tqdm bar on stderr that counts documents."""

    def __init__(self, name: str, enabled: bool):
        self._bar = tqdm(
            desc=f"prepare {name}",
            unit=" documents",
            file=sys.stderr,
            disable=None if enabled else True,  # None: only on a terminal
            mininterval=0.5,
        )
        self._began = time.monotonic()
        self._bytes = self._tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, num_bytes: int, num_tokens: int) -> None:
        self._bytes += num_bytes
        self._tokens += num_tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(
            f"{self._bytes / 1e6:.1f} MB, {rate:,.0f} tokens/s", refresh=False
        )
        self._bar.update()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        if not document.text:
            continue
        batch.append(document)
        chars += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _fraction_of(seed: int, raw: bytes) -> float:
    """A number in [0, 1), uniform over texts."""
    digest = hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()[:64]).digest()
    return int.from_bytes(digest, "big") / 2**64


def summarize(stores: dict[str, TokenStore]) -> dict[str, Any]:
    """Counts for a person or a program: over all splits, then for each."""
    total = {
        key: sum(getattr(store, f"num_{key}") for store in stores.values())
        for key in ("documents", "bytes", "tokens")
    }
    meta = stores["train"].meta
    summary = {
        **total,
        "bytes_per_token": round(total["bytes"] / total["tokens"], 4),
        "vocab_size": meta.vocab_size,
        "fingerprint": meta.fingerprint,
    }
    for split, store in stores.items():
        summary[f"{split}_documents"] = store.num_documents
        summary[f"{split}_tokens"] = store.num_tokens
    return summary


def format_summary(summary: dict[str, Any]) -> str:
    """`summarize` as aligned lines, with sizes in MB."""
    lines = []
    for key, value in summary.items():
        if key == "bytes":
            key, value = "text", f"{value / 1e6:.2f} MB"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{key.replace('_', ' '):<22}{value}")
    return "\n".join(lines)
