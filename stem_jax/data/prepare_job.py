"""What `python -m stem_jax.prepare` does: text and tokenizer to a folder that training reads."""

import argparse
import dataclasses
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from stem_jax.data.bad_records import BadRecords
from stem_jax.data.chat_template import Chat, load_chat
from stem_jax.data.formats import CHAT, Reading
from stem_jax.data.preparation import SKIPPED, TOKENIZER, Preparation, unfinished_job
from stem_jax.data.prepare import open_stores, write_stores
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.source_record import settings_record, text_record
from stem_jax.data.sources import check_folder, read_sources
from stem_jax.data.special_tokens import SpecialFlags
from stem_jax.data.store_summary import summarize
from stem_jax.data.token_store import META_FILE as STORE_META
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import (
    META_FILE,
    Tokenizer,
    load_tokenizer,
    load_tokenizer_folder,
)
from stem_jax.data.tokenizer_source import tokenizer_file
from stem_jax.errors import InputError
from stem_jax.files import read_json, write_whole
from stem_jax.outgoing import outgoing
from stem_jax.storage import Place, is_remote

# Of the records that were left out, on stderr; the file has them all.
_SHOWN = 5
# A trained model, while the text is tokenized with it.
_MODEL = "tokenizer.model"
# When the conversations are said to be, in a job of a template that writes dates.
_DATE = "date"
# Beside what was made for a bucket: of which job.
_MADE = ".job.json"


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the stores and the tokenizer in `args.out`, whole or not at all; a summary of them.

    args: see `prepare_flags.parse`. The same command goes on where one was that was stopped.
    Raises InputError as reading, `load_tokenizer`, `train_sentencepiece` and `write_stores` do.
    """
    names = [*args.input, *args.corpus]
    reading = Reading(args.text_field, args.format)
    tokenizer = None
    if args.vocab_size is None:
        flags = SpecialFlags.from_flags(args)
        path = args.tokenizer_path
        if path is not None:
            path = tokenizer_file(path, args.tokenizer, "--tokenizer-path")
        tokenizer = load_tokenizer(args.tokenizer, path, flags)
        for note in tokenizer.notes:
            print(f"note: {note}", file=sys.stderr)
    chat = None
    if args.format == CHAT:
        assert tokenizer is not None
        chat = load_chat(tokenizer, args.chat_template)
        # Whoever talks to the model that learns from these stores writes as they do.
        tokenizer = dataclasses.replace(tokenizer, chat_template=chat.template)
    job = _job(args, names, tokenizer, reading, chat)
    # What is made for a bucket stays here until it is there.
    with outgoing(args.out, "--out", f"train/{STORE_META}", keep=True) as out:
        made = out / _MADE
        if chat is not None and chat.is_dated:
            begun = [unfinished_job(out), read_json(made) if made.exists() else None]
            chat, job = _dated(chat, job, begun)
        if not (is_remote(args.out) and made.exists() and read_json(made) == _as_read(job)):
            made.unlink(missing_ok=True)
            pieces, resumed = _make(args, out, job, tokenizer, reading, chat)
            if is_remote(args.out):
                write_whole(made, json.dumps(job) + "\n")
        else:
            pieces = resumed = 0
        stores = open_stores(out, load_tokenizer_folder(out / TOKENIZER))
        note = stores["train"].meta.coverage_note
        if note:
            print(f"note: {note}", file=sys.stderr)
        summary = {"out": str(args.out), **summarize(stores)}
        summary |= {"pieces": pieces, "resumed_pieces": resumed}
        summary["skipped_records"] = _report_skipped(out / SKIPPED, args.out / SKIPPED)
    return summary


def _make(
    args: argparse.Namespace,
    out: Path,
    job: dict[str, Any],
    tokenizer: Tokenizer | None,
    reading: Reading,
    chat: Chat | None,
) -> tuple[int, int]:
    """Makes the stores in a folder of this machine; what `write_stores` returns."""
    _check_tokenizer_folder(out / TOKENIZER)
    pieces = resumed = 0
    with Preparation(out, job) as place:
        if not place.finished:
            tokenizer = tokenizer or _trained(place, job["sources"], reading, args)
            _put_tokenizer(tokenizer, place.new / TOKENIZER, out / TOKENIZER)
            way_out = "--on-bad=skip leaves such records out"
            with BadRecords(args.on_bad, place.new / SKIPPED, way_out=way_out) as bad:
                pieces, resumed = write_stores(
                    place,
                    read_sources(job["sources"], reading, bad),
                    tokenizer,
                    name=",".join(job["sources"]),
                    validation_fraction=args.validation_fraction,
                    seed=args.seed,
                    progress=not args.json,
                    processes=args.processes,
                    bad=bad,
                    chat=chat,
                )
    return pieces, resumed


def verify(folder: Path) -> dict[str, Any]:
    """Reads every byte of the stores in a folder and compares them with their checksums.

    Returns their summary. Raises InputError for what is damaged, missing, or of another tokenizer.
    """
    check_folder(folder, f"--out={folder}")
    found = [name for name in ("train", "validation") if (folder / name).exists()]
    stores = {name: TokenStore.open(folder / name, verify=True) for name in found or ["train"]}
    if (folder / TOKENIZER).exists():
        open_stores(folder, load_tokenizer_folder(folder / TOKENIZER))
    return {"out": str(folder), **summarize(stores)}


def _report_skipped(path: Path, shown: Place) -> int:
    """How many records were left out; says so on stderr, with the first places.

    shown: where the file will be.
    """
    if not path.exists():
        return 0
    count = 0
    with path.open(encoding="utf-8") as file:
        for count, line in enumerate(file, start=1):
            if count <= _SHOWN:
                print(f"skipped: {json.loads(line)['reason']}", file=sys.stderr)
    print(f"records left out: {count:,}, see {shown}", file=sys.stderr)
    return count


def _job(
    args: argparse.Namespace,
    names: list[str],
    tokenizer: Tokenizer | None,
    reading: Reading,
    chat: Chat | None,
) -> dict[str, Any]:
    """What the folder is a function of."""
    settings: dict[str, Any] = {"vocab_size": args.vocab_size}
    if tokenizer is not None:
        settings = settings_record(tokenizer, args.validation_fraction, args.seed)
        settings["special_tokens"] = tokenizer.special.record()
    settings |= {"validation_fraction": args.validation_fraction, "seed": args.seed}
    if chat is not None:
        settings["chat_template"] = chat.template
    return {"sources": names, **settings, **text_record(names, reading)}


def _dated(chat: Chat, job: dict[str, Any], begun: list[Any]) -> tuple[Chat, dict[str, Any]]:
    """With one date for all conversations: that of the same job that was begun, on another day."""
    moment = datetime.now().isoformat(timespec="seconds")
    for other in begun:
        if isinstance(other, dict) and other == _as_read(job) | {_DATE: other.get(_DATE)}:
            moment = other[_DATE]
    return dataclasses.replace(chat, moment=datetime.fromisoformat(moment)), job | {_DATE: moment}


def _trained(
    place: Preparation, names: list[str], reading: Reading, args: argparse.Namespace
) -> Tokenizer:
    path = place.work / _MODEL
    if not path.exists():
        with BadRecords(args.on_bad) as bad:
            texts = (document.text for document in read_sources(names, reading, bad))
            train_sentencepiece(texts, path.with_suffix(".part"), args.vocab_size)
        path.with_suffix(".part").rename(path)
    return load_tokenizer(args.tokenizer, path, SpecialFlags.from_flags(args))


def _put_tokenizer(tokenizer: Tokenizer, new: Path, old: Path) -> None:
    """Saves the tokenizer; what lies beside the same one in the folder that it replaces stays."""
    shutil.rmtree(new, ignore_errors=True)
    if old.exists() and load_tokenizer_folder(old).fingerprint == tokenizer.fingerprint:
        shutil.copytree(old, new)
    tokenizer.save(new)


def _as_read(job: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(job))


def _check_tokenizer_folder(folder: Path) -> None:
    if folder.exists() and not (folder / META_FILE).is_file():
        raise InputError(
            f"folder {folder} exists and has no {META_FILE}: it would be replaced; remove it or"
            " write elsewhere"
        )
