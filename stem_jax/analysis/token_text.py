"""The text that a model is looked at with: its tokens in order, and as shuffled batches."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.config import Config
from stem_jax.data.formats import AS_FOUND, Reading
from stem_jax.data.loader import GlobalBatches, HostBatch
from stem_jax.data.sources import OpenedSource, open_sources, parse_sources
from stem_jax.errors import InputError
from stem_jax.training.run_data import prepared_folder, reading_of

# Where nobody says how many tokens are read.
DEFAULT_TOKENS = 1 << 18
# Longer sequences say little more about a token, and cost more.
_LONGEST = 512
_BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class TokenText:
    """Opened token stores. name: as data.sources. context: tokens of a row of a batch."""

    name: str
    sources: tuple[OpenedSource, ...]
    context: int
    seed: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all stores."""
        return sum(source.train.num_tokens for source in self.sources)

    @property
    def batch_size(self) -> int:
        """Rows of a batch; a short text fills less than one."""
        return max(1, min(_BATCH_TOKENS, self.num_tokens - 1) // self.context)

    def count(self, tokens: int | None) -> int:
        """How many tokens `batches` gives for `tokens`: whole batches, at most one pass.

        Raises:
            InputError: the text has fewer tokens than asked for, or than one row of each source.
        """
        if tokens is not None and tokens < 1:
            raise InputError(f"--tokens={tokens} must be at least 1")
        if tokens is not None and tokens > self.num_tokens:
            raise InputError(
                f"--tokens={tokens} is more than the {self.num_tokens} tokens of the text "
                f"{self.name}; ask for fewer, or give a longer --text"
            )
        step = self.batch_size * self.context
        asked = min(tokens or DEFAULT_TOKENS, self.num_tokens)
        return max(asked // step, 1) * step

    def batches(self, tokens: int | None) -> Iterator[HostBatch]:
        """Shuffled batches of `count(tokens)` tokens in all, sources in proportion to weights."""
        batches = GlobalBatches(
            [(source.train, source.weight) for source in self.sources],
            seq_len=self.context,
            global_batch_size=self.batch_size,
            seed=self.seed,
        )
        number = self.count(tokens) // (self.batch_size * self.context)
        return (batches.batch(index) for index in range(number))

    def ids(self, limit: int) -> np.ndarray:
        """The beginnings of the stores one after the other, in proportion: [n] int32, n <= limit.

        Documents follow each other as in training, with the bos and eos of each.
        """
        share = min(1.0, limit / self.num_tokens)
        parts = [s.train.tokens[: int(share * s.train.num_tokens)] for s in self.sources]
        return np.concatenate(parts).astype(np.int32)


@contextlib.contextmanager
def open_text(
    run: LoadedRun, workdir: str | Path, text: str | None, reading: Reading = AS_FOUND
) -> Iterator[TokenText]:
    """Opens the text to look at a run with, for as long as the context lasts.

    Args:
        workdir: of the run.
        text: as `data.sources`; None for what the run was trained on, as it was prepared then.
        reading: of files in `text`.

    Raises:
        InputError: text that cannot be read, that was prepared with another tokenizer, or that is
            shorter than a row.
    """
    with tempfile.TemporaryDirectory() as folder:
        sources = _open(run, Path(workdir), text, Path(folder), reading)
        context = min(run.config.train.seq_len, _LONGEST)
        for source in sources:
            if source.train.num_tokens <= context:
                raise InputError(
                    f"the text {source.source} has {source.train.num_tokens} tokens, fewer than "
                    f"the {context + 1} of one sequence; give a longer --text"
                )
        name = text or run.config.data.sources
        yield TokenText(name, sources, context, run.config.train.seed)


def reading_config(config: Config, text: TokenText) -> Config:
    """The configuration of a model that reads the batches of a text."""
    train = dataclasses.replace(
        config.train,
        seq_len=text.context,
        global_batch_size=text.batch_size,
        micro_batches=1,
    )
    return dataclasses.replace(config, train=train)


def _open(
    run: LoadedRun, workdir: Path, text: str | None, folder: Path, reading: Reading
) -> tuple[OpenedSource, ...]:
    data = run.config.data
    options: dict[str, Any] = {
        "seed": run.config.train.seed,
        "vocab_size": run.config.model.vocab_size,
    }
    if text is not None:
        specs = parse_sources(text, "--text")
        options |= {"validation_fraction": 0, "reading": reading}
        return open_sources(specs, run.tokenizer, folder, **options)
    prepared = prepared_folder(run.config, workdir)
    return open_sources(
        parse_sources(data.sources),
        run.tokenizer,
        prepared if prepared.is_dir() else folder,
        validation_fraction=data.validation_fraction,
        reading=reading_of(data),
        keep=True,
        **options,
    )
