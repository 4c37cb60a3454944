"""The tokenizer, the training batches and the held-out batches of a run."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stem_jax.bucket_files import opened
from stem_jax.config import Config, DataConfig
from stem_jax.data.formats import Reading
from stem_jax.data.loader import WHOLE, GlobalBatches, Share, ValidationBatches
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.sources import (
    OpenedSource,
    check_folder,
    is_store_folder,
    open_sources,
    parse_sources,
    read_sources,
    stores_folder,
)
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import Tokenizer, load_tokenizer, load_tokenizer_folder
from stem_jax.data.tokenizer_source import tokenizer_file
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import keys_on_the_host, memories, with_eos
from stem_jax.processes.process_log import log
from stem_jax.storage import local_path

TOKENIZER_FOLDER = "tokenizer"


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads. `held_out` is None if no source has validation documents."""

    tokenizer: Tokenizer
    batches: GlobalBatches
    sources: tuple[OpenedSource, ...]
    held_out: ValidationBatches | None

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """Of the training text, one for each source."""
        return tuple(source.train for source in self.sources)


def open_run_data(
    config: Config,
    workdir: Path,
    *,
    prepared: bool = False,
    checksums: Collection[str] = (),
    share: Share = WHOLE,
    first_step: int = 0,
) -> RunData:
    """Prepares what was not prepared before and opens the sources.

    Args:
        prepared: read the tokenizer and the prepared text of the work folder as they are.
        checksums: of the training text as it was prepared, if they are known.
        share: what this process reads of each global batch.
        first_step: the number of the first training batch.

    Raises:
        InputError: sources that cannot be read, or a tokenizer that does not fit the model.
    """
    data, train = config.data, config.train
    tokenizer = run_tokenizer(config, workdir, prepared)
    # Of text that is prepared here another seed holds out other documents; stores have their split.
    sources = open_sources(
        parse_sources(data.sources),
        tokenizer,
        prepared_folder(config, workdir),
        validation_fraction=data.validation_fraction,
        seed=train.seed,
        reading=reading_of(data),
        vocab_size=config.model.vocab_size,
        keep=prepared,
        checksums=checksums,
    )
    if not prepared:
        for source in sources:
            note = source.train.meta.coverage_note
            if note:
                log.info(f"note: {source.source}: {note}")
    slices: dict[str, Any] = {
        "seq_len": train.seq_len,
        "global_batch_size": train.global_batch_size,
        "share": share,
        "packing": data.packing,
        "keys_of": keys_on_the_host(memories(with_eos(config, tokenizer.special.eos_id))),
    }
    held_out = [source.validation for source in sources if source.validation is not None]
    batches = GlobalBatches(
        [(s.train, s.weight) for s in sources], seed=train.seed, first_step=first_step, **slices
    )
    if not prepared:
        for source, rows in zip(sources, batches.rows, strict=True):
            if rows.note:
                log.info(f"{source.source}: {rows.note}")
    return RunData(
        tokenizer,
        batches,
        sources,
        ValidationBatches(held_out, max_batches=config.eval.max_batches, **slices)
        if held_out
        else None,
    )


def reading_of(
    data: DataConfig, text_field: str | None = None, format: str | None = None
) -> Reading:
    """How a run reads text; a flag that is given goes before its key."""
    return Reading(text_field or data.text_field, format or data.format)


def run_tokenizer(config: Config, workdir: Path, prepared: bool) -> Tokenizer:
    """The run's tokenizer, which stays in `<workdir>/tokenizer` as long as the run has checkpoints.

    It is the configured one, else that of the run that this one begins with, else that of the first
    prepared token store among the sources, else a sentencepiece model trained here on the sources.
    Conversations among the sources bring their chat template along, and what ends a turn in it.
    """
    folder = workdir / TOKENIZER_FOLDER
    data = config.data
    if prepared:
        tokenizer = load_tokenizer_folder(folder)
    else:
        # Before a tokenizer is trained on what cannot be read.
        for spec in parse_sources(data.sources):
            check_folder(spec.source)
        # Of an import prompts may begin otherwise; those of this run as its documents do.
        tokenizer = _talking(_first_tokenizer(config, workdir).for_documents(), config)
    if not prepared and _kind_counts(config) and tokenizer.kind != data.tokenizer:
        raise InputError(
            f"data.tokenizer={data.tokenizer!r}, but the tokenizer of this run is "
            f"{tokenizer.kind!r}; set data.tokenizer={tokenizer.kind}"
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids; set model.vocab_size={tokenizer.vocab_size}"
        )
    if not prepared:
        for note in tokenizer.notes:
            log.info(note)
        tokenizer.save(folder)
    return tokenizer


def prepared_folder(config: Config, workdir: Path) -> Path:
    """Where the text of a run is prepared."""
    folder = config.data.folder
    return local_path(folder, "data.folder") if folder else workdir / "data"


def _kind_counts(config: Config) -> bool:
    """Whether `data.tokenizer` says what is made here. Prepared stores come with theirs."""
    sources = [spec.source for spec in parse_sources(config.data.sources)]
    return config.data.tokenizer_path is not None or not all(map(is_store_folder, sources))


def _talking(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """A tokenizer as the first source of conversations was prepared with it."""
    talking: Tokenizer | None = None
    for spec in parse_sources(config.data.sources):
        if not is_store_folder(spec.source):
            continue
        folder = stores_folder(spec.source)
        if not (folder / TOKENIZER_FOLDER).is_dir():
            continue
        found = load_tokenizer_folder(folder / TOKENIZER_FOLDER)
        # Another vocabulary is refused where the store is opened.
        same = found.fingerprint == tokenizer.fingerprint
        if not same or TokenStore.open(folder / "train").scored is None:
            continue
        if talking is None:
            special = dataclasses.replace(tokenizer.special, stop_ids=found.special.stop_ids)
            talking = dataclasses.replace(
                tokenizer, special=special, chat_template=found.chat_template
            )
            continue
        theirs, ours = ((one.chat_template, one.special.stop_ids) for one in (found, talking))
        if theirs != ours:
            other = "another chat template" if theirs[0] != ours[0] else "another --stop"
            log.warning(
                f"data.sources: {spec.source} was prepared with {other} than the first source of "
                "conversations, whose template and stops the run keeps; prepare it again with "
                "those if it was not meant"
            )
    return talking or tokenizer


def _first_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    data = config.data
    specs = parse_sources(data.sources)
    if data.tokenizer_path is not None or data.tokenizer == "bytes":
        given = data.tokenizer_path
        file = None
        if given is not None:
            file = tokenizer_file(given, data.tokenizer, "data.tokenizer_path")
        return load_tokenizer(data.tokenizer, file)
    for key, folder in config.origins.items():
        return load_tokenizer_folder(opened(folder, key) / TOKENIZER_FOLDER)
    for spec in specs:
        if is_store_folder(spec.source):
            beside = stores_folder(spec.source) / TOKENIZER_FOLDER
            if beside.is_dir():
                return load_tokenizer_folder(beside)
    if data.tokenizer != "sentencepiece":
        raise InputError(
            f"data.tokenizer={data.tokenizer!r} needs data.tokenizer_path; only sentencepiece can "
            "be trained here"
        )
    path = workdir / "tokenizer.model"
    documents = read_sources([spec.source for spec in specs], reading_of(data))
    texts = (document.text for document in documents)
    train_sentencepiece(texts, path, config.model.vocab_size)
    tokenizer = load_tokenizer("sentencepiece", path)
    path.unlink()
    return tokenizer
