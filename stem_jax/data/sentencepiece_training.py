"""Training of a SentencePiece model whose ids transformers gives as well."""

import io
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from stem_jax.data.tokenizer_kinds import checked_text
from stem_jax.errors import InputError

# The trainer loads its input whole; 20 MB are plenty for a vocabulary.
TRAINING_BYTES = 20_000_000
# The trainer silently drops sentences over 4192 bytes; a character has at most 4.
_TRAINING_PIECE_CHARS = 1000


def train_sentencepiece(texts: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Trains a byte-fallback BPE model and writes it to `path`; equal texts give equal bytes.

    texts: any amount; lines are sampled evenly down to 20 MB.
    vocab_size: pieces, the 256 byte pieces and unk (0), bos (1), eos (2) included.
    Raises InputError if the text is empty, or too small or too varied for the vocabulary; the
    message names one that works.
    """
    model = io.BytesIO()
    pieces = _sample_pieces(texts)
    if not pieces:
        raise InputError("tokenizer training got no text: give documents that are not empty")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            # The next four make ids equal to those of transformers' LlamaTokenizer, and text exact.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # stored in the model, so part of its fingerprint
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_training_remedy(str(error), vocab_size)) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(model.getvalue())


def _sample_pieces(texts: Iterable[str]) -> list[str]:
    """Lines of at most 1000 characters, thinned evenly whenever they exceed TRAINING_BYTES."""
    pieces: list[str] = []
    size, stride, index = 0, 1, 0
    for text in texts:
        # The trainer skips sentences with a tab; a newline would never be part of a piece anyway.
        for line in re.split(r"[\n\t]", text):
            for start in range(0, len(line), _TRAINING_PIECE_CHARS):
                index += 1
                if index % stride:
                    continue
                pieces.append(checked_text(line[start : start + _TRAINING_PIECE_CHARS]))
                size += len(pieces[-1].encode())
                while size > TRAINING_BYTES and len(pieces) > 1:
                    pieces = pieces[1::2]
                    size = sum(len(piece.encode()) for piece in pieces)
                    stride *= 2
    return pieces


def _training_remedy(message: str, vocab_size: int) -> str:
    too_high = re.search(r"Please set it to a value <= (\d+)", message)
    if too_high:
        return (
            f"vocab_size {vocab_size} is too large for this text: use at most {too_high[1]}, or"
            " give more text"
        )
    too_low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_low:
        return (
            f"vocab_size {vocab_size} is too small for the characters of this text: use at least"
            f" {too_low[1]}"
        )
    reason = " ".join(message.split())
    return f"tokenizer training with vocab_size {vocab_size} failed: {reason}; use other text"
