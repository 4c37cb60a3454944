"""The text of a conversion: batches that rows are made and trained from, and held-out ones."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from stem_jax.config import Config
from stem_jax.data.documents import Document
from stem_jax.data.loader import GlobalBatches, ValidationBatches
from stem_jax.data.prepare import open_stores, prepare_stores
from stem_jax.data.sources import is_store_folder, parse_sources, read_sources, stores_folder
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.training.evaluation import Validation, summarize
from stem_jax.training.run_data import reading_of
from stem_jax.training.schedule import Schedule
from stem_jax.training.state import TrainState
from stem_jax.training.step import TrainStep

_HELD_OUT_BATCHES = 64
_PIECE_CHARS = 4096


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """batches: shuffled. num_batches: before one comes again. held_out: other documents."""

    batches: GlobalBatches
    num_batches: int
    held_out: ValidationBatches

    @classmethod
    def open(cls, config: Config, tokenizer: Tokenizer, folder: Path) -> Self:
        """Prepares `data.sources` in a folder; token stores among them are read where they are.

        Raises:
            InputError: they cannot be read, are too short, or have nothing held out.
        """
        train = config.train
        if not config.data.validation_fraction:
            raise InputError(
                "data.validation_fraction=0 leaves no text to measure the loss of a conversion on; "
                "set it above 0"
            )
        stores: list[tuple[TokenStore, float]] = []
        held_out = []
        for number, spec in enumerate(parse_sources(config.data.sources)):
            found = _stores(spec.source, config, tokenizer, folder / str(number))
            stores.append((found["train"], spec.weight))
            held_out += [found["validation"]] if "validation" in found else []
        if not held_out:
            raise InputError(
                f"the token stores in {config.data.sources} have no validation split to measure "
                "the loss of a conversion on; prepare one with --validation-fraction above 0"
            )
        sizes: dict[str, Any] = {
            "seq_len": train.seq_len,
            "global_batch_size": train.global_batch_size,
        }
        limit = config.eval.max_batches or _HELD_OUT_BATCHES
        return cls(
            GlobalBatches(stores, seed=train.seed, **sizes),
            max(sum(store.num_tokens for store, _ in stores) // config.tokens_per_step, 1),
            ValidationBatches(held_out, max_batches=limit, **sizes),
        )

    def loss(self, programs: TrainStep, state: TrainState, schedule: Schedule) -> Validation:
        """On the held-out documents."""
        sums = [
            programs.evaluate(state, programs.place(batch), schedule) for batch in self.held_out
        ]
        return summarize(sums, self.held_out.num_bytes, self.held_out.left_out)


def _stores(
    source: str, config: Config, tokenizer: Tokenizer, folder: Path
) -> dict[str, TokenStore]:
    if is_store_folder(source):
        return open_stores(stores_folder(source), tokenizer, config.model.vocab_size)
    return prepare_stores(
        _documents(source, config),
        tokenizer,
        folder,
        name=source,
        validation_fraction=config.data.validation_fraction,
        seed=config.train.seed,
        progress=True,
    )


def _documents(source: str, config: Config) -> Iterator[Document]:
    """A source of one document is cut at line ends, or nothing of it could be held out."""
    documents = read_sources([source], reading_of(config.data))
    first, second = next(documents, None), next(documents, None)
    if first is not None and second is None:
        yield from _pieces(first)
        return
    for document in (first, second):
        if document is not None:
            yield document
    yield from documents


def _pieces(document: Document) -> Iterator[Document]:
    lines, size = [], 0
    for line in document.text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _PIECE_CHARS:
            yield Document("".join(lines), document.origin)
            lines, size = [], 0
    if lines:
        yield Document("".join(lines), document.origin)
