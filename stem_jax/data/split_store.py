"""One token store of documents whose split was decided elsewhere."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from stem_jax.data.coverage import UNSEEN
from stem_jax.data.documents import Document
from stem_jax.data.encoded_piece import EncodedPiece
from stem_jax.data.encoder_pool import cores, encode_pieces
from stem_jax.data.piece_encoder import PieceEncoder, cut_pieces
from stem_jax.data.token_store import TokenStore
from stem_jax.data.token_store_writer import TokenStoreWriter
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import BadRecord


def write_split(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    name: str,
    split: str,
    processes: int | None = None,
) -> TokenStore:
    """Writes documents, all of them in their order, as the store `folder`; returns it opened.

    A folder that is left by an exception holds no store; its caller removes it. The bytes are the
    same for any number of processes.

    Args:
        documents: each with text.
        name, split: that the store's meta data give.
        processes: that tokenize; None: one for each core.

    Raises:
        InputError: no documents, one that the tokenizer cannot take, or a store in the folder.
        TrainingError: a process was killed.
    """
    writer = TokenStoreWriter(
        folder,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        name=name,
        split=split,
    )
    waiting: dict[int, EncodedPiece] = {}
    written, coverage = 0, UNSEEN
    encoder = PieceEncoder(tokenizer, seed=0)
    pieces = encode_pieces(
        enumerate(cut_pieces(documents)), encoder, cores() if processes is None else processes
    )
    try:
        with closing(pieces):
            # They come in any order; at most two for each process wait.
            for index, content in pieces:
                waiting[index] = EncodedPiece.from_bytes(content)
                while (piece := waiting.pop(written, None)) is not None:
                    for origin, reason in piece.bad:
                        raise BadRecord(reason, origin)
                    writer.extend(piece.tokens, piece.lengths, piece.num_bytes)
                    coverage += piece.coverage
                    written += 1
        writer.close(coverage)
    except BaseException:
        writer.abort()
        raise
    return TokenStore.open(folder)
