"""Conversations that a person gives to be gone on with: words of a user, or files of messages."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.data.chat_template import check_messages, load_chat
from stem_jax.errors import BadRecord, InputError
from stem_jax.files import read_json

Conversation = list[dict[str, Any]]


def with_conversations(
    run: LoadedRun, said: Sequence[str], args: argparse.Namespace
) -> tuple[LoadedRun, list[str]]:
    """A run that is talked to, and the prompts, in which texts of special tokens are these tokens.

    said: by a user. args: see `flags.parse`.
    Raises InputError for a run without a chat template, and for messages that are none.
    """
    chat = load_chat(run.tokenizer, args.chat_template)
    prompts = [chat.prompt(messages) for messages in read_conversations(said, args.messages)]
    return dataclasses.replace(run, tokenizer=chat.prompt_tokenizer), prompts


def read_conversations(said: Sequence[str], files: Sequence[Path]) -> list[Conversation]:
    """Conversations of one turn each, then those of JSON files: their messages, in a list.

    Raises InputError for a file that holds no messages, saying what is wrong with them.
    """
    found = [[{"role": "user", "content": text}] for text in said]
    for path in files:
        messages = read_json(path)
        try:
            check_messages(messages)
        except BadRecord as error:
            raise InputError(f"--messages={path}: {error}") from error
        found.append(messages)
    return found
