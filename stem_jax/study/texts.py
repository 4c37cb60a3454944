"""Preparation of the study's texts: fetched, cleaned of duplicates, tokenized, in one folder."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.config_program import found_program, run_program
from stem_jax.data.corpora import read_corpus
from stem_jax.data.documents import Document
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.split_store import write_split
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.files import new_folder, write_whole
from stem_jax.study.held_runs import overall, overlap_of
from stem_jax.study.near_duplicates import NEAR, find_duplicates
from stem_jax.study.packages import cache_folder, fetch, members
from stem_jax.study.prepared_text import (
    DOCUMENTS,
    FORMAT,
    RECORD,
    STORE,
    STORES,
    PreparedText,
    checksums_of,
    open_text,
)
from stem_jax.study.recipes import SPLITS, TextRecipe
from stem_jax.study.text_documents import RULES, TextDocument, text_of
from stem_jax.study.word_runs import WordRuns

FACTS = "facts"
# With so many, 78 of the 195 countries are one token behind a space: two in five.
FACTS_VOCAB_SIZE = 1224
__all__ = ["FACTS", "FACTS_VOCAB_SIZE", "PreparedText", "load_recipes", "open_text", "prepare_text"]


def load_recipes() -> dict[str, TextRecipe]:
    """The shipped recipes by name, those of configs/study/texts.py, checked.

    Raises:
        InputError: one that contradicts itself.
    """
    path = found_program(Path("texts"), "list of texts", "", "study")
    recipes: dict[str, TextRecipe] = run_program(
        path, "list of texts", lambda module: module.get_texts()
    )
    for name, recipe in recipes.items():
        recipe.check(name)
    return recipes


def prepare_text(
    name: str,
    folder: Path,
    vocab_size: int,
    *,
    recipe: TextRecipe | None = None,
    cache: Path | None = None,
    processes: int | None = None,
) -> PreparedText:
    """A text in a folder; prepared there, whole or not at all, if the folder does not exist.

    Equal recipes give equal bytes, for any number of processes. Documents that say what an earlier
    one says are left out, test before dev before train, so training loses what it shares with
    held-out text. The tokenizer is trained on the training split.

    Args:
        name: one of configs/study/texts.py, or `facts`.
        vocab_size: of the tokenizer.
        recipe: in place of the shipped one of that name.
        cache: where archives are kept; None: `cache_folder()`.
        processes: that tokenize; None: one for each core.

    Raises:
        InputError: an unknown name, an archive that cannot be had, or a folder of something else.
        TrainingError: a process was killed.
    """
    if name != FACTS and recipe is None:
        recipes = load_recipes()
        if name not in recipes:
            known = ", ".join([*recipes, FACTS])
            raise InputError(f"text {name!r} is unknown: use one of {known}")
        recipe = recipes[name]
    digest = recipe.digest if recipe else ""
    if folder.exists():
        text = open_text(folder)
        there = text.record
        found = (text.name, there.get("vocab_size"), there.get("recipe"))
        # What is text in a file, and which documents are alike, may have been decided anew.
        rules = (RULES[recipe.kind], NEAR) if recipe else (None, None)
        if found != (name, vocab_size, digest) or (there.get("rule"), there.get("near")) != rules:
            raise InputError(
                f"folder {folder} holds text {text.name} of vocabulary {found[1]}, another than"
                f" {name} of {vocab_size} as it is described now: give a new folder"
            )
        return text
    said: dict[str, Any] = {"format": FORMAT, "name": name, "vocab_size": vocab_size}
    said["recipe"] = digest
    if recipe is None:
        documents = [
            TextDocument(FACTS, f"{FACTS}#{index}", "train", text)
            for index, text in enumerate(read_corpus(FACTS))
        ]
        overlaps: list[float | None] = [None] * len(documents)
        said |= {"kind": FACTS, "packages": []}
    else:
        documents, overlaps, report = _documents(recipe, cache or cache_folder())
        said |= {"kind": recipe.kind, "rule": RULES[recipe.kind], "near": NEAR, **report}
    with new_folder(folder, "text folder") as made:
        said |= _write(made, name, documents, overlaps, vocab_size, processes)
        write_whole(made / RECORD, json.dumps(said, indent=2) + "\n")
    return open_text(folder)


def _documents(
    recipe: TextRecipe, cache: Path
) -> tuple[list[TextDocument], list[float | None], dict[str, Any]]:
    """The documents that stay, test first, the overlap of each, and the record of it all."""
    found: list[TextDocument] = []
    packages = []
    for split in SPLITS:
        for package in recipe.packages:
            if package.split != split:
                continue
            files = members(package, fetch(package, cache))
            texts = ((path, text_of(recipe.kind, path, raw)) for path, raw in files)
            found += [TextDocument(package.name, p, split, t) for p, t in texts if t is not None]
            packages.append(dataclasses.asdict(package))
    numbers = WordRuns()
    runs = [numbers.of(document.text) for document in found]
    duplicates = find_duplicates([document.text for document in found], runs)
    for said in packages:
        for key, how in (("documents", ""), ("exact", "exact"), ("near", "near")):
            said[key] = sum(
                document.package == said["name"] and kind == how
                for document, (kind, _) in zip(found, duplicates, strict=True)
            )
    stay = [index for index, (kind, _) in enumerate(duplicates) if not kind]
    documents, runs = [found[index] for index in stay], [runs[index] for index in stay]
    overlaps, shares = _overlaps(documents, runs)
    return documents, overlaps, {"packages": packages, "overlap": shares}


def _overlaps(
    documents: Sequence[TextDocument], runs: Sequence[np.ndarray]
) -> tuple[list[float | None], dict[str, float]]:
    """Of each document, None for training's, and of dev and test as a whole."""
    by_split = {
        split: [index for index, document in enumerate(documents) if document.split == split]
        for split in SPLITS
    }
    training = [runs[index] for index in by_split["train"]]
    overlaps: list[float | None] = [None] * len(documents)
    shares = {}
    for split in ("test", "dev"):
        held_out = [runs[index] for index in by_split[split]]
        found = overlap_of(held_out, training)
        for index, share in zip(by_split[split], found, strict=True):
            overlaps[index] = round(share, 6)
        shares[split] = round(overall(found, held_out), 6)
    return overlaps, shares


def _write(
    folder: Path,
    name: str,
    documents: Sequence[TextDocument],
    overlaps: Sequence[float | None],
    vocab_size: int,
    processes: int | None,
) -> dict[str, Any]:
    """Writes all but text.json; returns its counts and checksums."""
    model = folder / "tokenizer.model"
    training = (document.text for document in documents if document.split == "train")
    train_sentencepiece(training, model, vocab_size)
    tokenizer = load_tokenizer("sentencepiece", model)
    model.unlink()
    tokenizer.save(folder / STORE / "tokenizer")
    counts, listed = {}, {}
    for split in reversed(SPLITS):
        chosen = [
            (document, overlap)
            for document, overlap in zip(documents, overlaps, strict=True)
            if document.split == split
        ]
        if not chosen:
            continue
        store = write_split(
            [Document(d.text, f"{d.package}/{d.path}") for d, _ in chosen],
            tokenizer,
            folder / STORES[split],
            name=name,
            split="validation" if split == "dev" else split,
            processes=processes,
        )
        counts[split] = {
            "documents": store.num_documents,
            "tokens": store.num_tokens,
            "bytes": store.num_bytes,
        }
        listed[split] = [
            {"package": d.package, "path": d.path, "bytes": len(d.text.encode())}
            | ({} if overlap is None else {"overlap": overlap})
            for d, overlap in chosen
        ]
    write_whole(folder / DOCUMENTS, json.dumps(listed, indent=1) + "\n")
    return {"counts": counts, "checksums": checksums_of(folder, list(counts))}
