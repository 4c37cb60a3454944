"""Conversations that a person gives to be gone on with: words of a user, or files of messages."""

import argparse
import dataclasses
from collections.abc import Sequence
from datetime import datetime

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.data.chat_template import load_chat
from stem_jax.errors import BadRecord, InputError
from stem_jax.files import read_json


def with_conversations(
    run: LoadedRun, said: Sequence[str], args: argparse.Namespace, now: datetime | None = None
) -> tuple[LoadedRun, list[str]]:
    """A run that is talked to, and the prompts, in which texts of special tokens are these tokens.

    said: by a user. args: see `flags.parse`. now: to a template that writes dates; None: really.
    Raises InputError for a run without a chat template, and for messages that are none.
    """
    chat = dataclasses.replace(load_chat(run.tokenizer, args.chat_template), moment=now)
    prompts = [chat.prompt([{"role": "user", "content": text}]) for text in said]
    for path in args.messages:
        try:
            prompts.append(chat.prompt(read_json(path)))
        except BadRecord as error:
            raise InputError(f"--messages={path}: {error}") from error
    return dataclasses.replace(run, tokenizer=chat.prompt_tokenizer), prompts
