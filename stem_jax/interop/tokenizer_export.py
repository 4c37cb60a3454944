"""Tokenizers for the transformers library, written only if they give the same ids.

Rows belong to token ids, so another id is another row: a tokenizer that differs on some texts
spoils the model on them without a sign. The file that is written is read again and compared on a
corpus of texts that tokenizers are known to differ on.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from stem_jax.data.shipped_files import CHAT_TEMPLATE, DEFAULT_TEMPLATE, OTHER_TEMPLATES
from stem_jax.data.tokenizer_kinds import (
    BytesTokenizer,
    HfTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    marked_special,
)
from stem_jax.errors import InputError

NATIVE_FOLDER = "native_tokenizer"
_SPACE = "\u2581"
# How vocabularies call a token that is for padding alone.
_PADDING = """
<pad> [PAD] <|pad|> <|padding|> <|finetune_right_pad_id|> <|PAD_TOKEN|> <｜▁pad▁｜>
""".split()
_TOPICS = 40
_PROBES = (
    "",
    " ",
    "      six spaces, and three at the end   ",
    "\ttab\t\ttabs\n\n\nnewlines\r\nand carriage returns\r",
    "def f(x):\n    if x > 10_000:\n        return [x ** 2, 0xFF, 1.5e-3]\n",
    "1 12 123 1234567890 3.14159 ١٢٣ ①②③ ½ x² H₂O",
    "ﬁne ligatures ﬀ, ＦＵＬＬ ｗｉｄｔｈ, ℌ, ™, Å and Å",
    "café, cafe\u0301, naïve, Straße, İstanbul, ǅ",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "Русский текст, Ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "👍🏽 👨‍👩‍👧‍👦 🇫🇷 ☕\ufe0f",
    "no\u00a0break, zero\u200bwidth, em\u2003space, line\u2028separator, \ufeffmark",
    "<s>",
    "</s> and <s> in a text, <unk>, <0x41>, [INST], <|endoftext|>",
    "quotes “”‘’ … — – ¿¡ «»",
    "ALL CAPS CamelCase snake_case kebab-case http://a.b/c?d=e&f#g",
    "control \x00\x01\x1f\x7f characters",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ======= -------- ......... !!!!!!",
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes `tokenizer.json`, its configuration, chat templates, and ours for an import.

    Args:
        tokenizer: of the model. Its ids are those that a prompt has here.
        folder: of the export.
        context: tokens that the model takes.

    Raises:
        InputError: the file gives other ids than the tokenizer, or there is no way to write it.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "exporting the tokenizer needs the tokenizers package: pip install tokenizers, or give "
            "--no-tokenizer"
        ) from error
    description = _description(tokenizer)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(description, ensure_ascii=False, indent=1), "utf-8")
    written = tokenizers.Tokenizer.from_file(str(path))
    settings = _settings(tokenizer, written, context)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, "utf-8")
    _write_templates(tokenizer, folder)
    _check(tokenizer, written)
    tokenizer.save(folder / NATIVE_FOLDER)


def _check(tokenizer: Tokenizer, written: Any) -> None:
    """Raises InputError unless the library's tokenizer gives our ids."""
    special = marked_special(written)
    texts = [f"a{name} {name}\n{name}b" for name in special]
    for text in (*probe_texts(), *texts):
        ours = [*tokenizer.special.begin_ids, *tokenizer.encode(text)]
        # Training takes the text of a special token as text; that is `split_special_tokens` here.
        for as_text in (True, False):
            written.encode_special_tokens = as_text
            theirs = written.encode(text).ids
            if ours != theirs and (as_text or not any(one in text for one in special)):
                raise InputError(_difference(text, ours, theirs))


def padding_id(tokenizer: Tokenizer) -> int | None:
    """The token that pads batches: the vocabulary's own, else unk, else bos; never eos.

    Collators of transformers take padding out of the labels: with eos as padding a model that is
    trained further never learns to stop. None if the vocabulary has no such token.
    """
    special, own, unknown = tokenizer.special, None, None
    if isinstance(tokenizer, SentencePieceTokenizer):
        own, unknown = tokenizer.processor.pad_id(), tokenizer.processor.unk_id()
    elif isinstance(tokenizer, HfTokenizer):
        description = json.loads(tokenizer.source)
        vocabulary = tokenizer.processor.get_vocab(with_added_tokens=True)
        names = [(description.get("padding") or {}).get("pad_token")]
        names += [name for name in _PADDING if name in tokenizer.special_texts]
        own = next((vocabulary[name] for name in names if name in vocabulary), None)
        unknown = vocabulary.get(description["model"].get("unk_token"))
    for number in (special.pad_id, own, unknown, special.bos_id):
        if number is not None and number >= 0 and number != special.eos_id:
            return number
    return None


def _settings(tokenizer: Tokenizer, written: Any, context: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    ids = {
        "bos_token": tokenizer.special.bos_id,
        "eos_token": tokenizer.special.eos_id,
        "pad_token": padding_id(tokenizer),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: written.id_to_token(n) for name, n in ids.items() if n is not None},
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _write_templates(tokenizer: Tokenizer, folder: Path) -> None:
    """The chat template, or several: files of their own, as transformers 5 writes them."""
    found = tokenizer.chat_template
    if found is None:
        return
    named = {DEFAULT_TEMPLATE: found} if isinstance(found, str) else found
    for name, template in named.items():
        path = folder / CHAT_TEMPLATE
        if name != DEFAULT_TEMPLATE:
            if Path(name).name != name:
                raise InputError(f"a chat template is named {name!r}, which is no name of a file")
            path = folder / OTHER_TEMPLATES / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, "utf-8", newline="")


def probe_texts() -> Iterator[str]:
    """Texts on which tokenizers are known to differ, and documentation of Python."""
    yield from _PROBES
    for name in sorted(topics)[:_TOPICS]:
        yield topics[name]


def _difference(text: str, ours: list[int], theirs: list[int]) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs))
    )
    return (
        f"the exported tokenizer differs on {text[:40]!r}: token {place} is "
        f"{theirs[place : place + 1]}, in training it was {ours[place : place + 1]}, so that rows "
        "of other tokens would be read; give --no-tokenizer to export without it, and encode texts "
        "with the tokenizer of the work folder"
    )


def _description(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    if isinstance(tokenizer, HfTokenizer):
        # Without padding and truncation; what flags or an earlier version made special is marked.
        description = json.loads(tokenizer.processor.to_str())
        text_of = tokenizer.processor.id_to_token
    elif isinstance(tokenizer, SentencePieceTokenizer):
        description, text_of = _sentencepiece(tokenizer), tokenizer.processor.id_to_piece
    elif isinstance(tokenizer, BytesTokenizer):
        pieces = [*(f"<0x{value:02X}>" for value in range(256)), "<s>", "</s>"]
        description, text_of = _byte_fallback(pieces, {256, 257}, None, []), pieces.__getitem__
    else:
        raise InputError(
            f"tokenizer kind {tokenizer.kind!r} has no form in transformers; give --no-tokenizer"
        )
    # Prompts begin with these here, too.
    begin = {text_of(number): number for number in tokenizer.special.begin_ids}
    first = [{"SpecialToken": {"id": text, "type_id": 0}} for text in begin]
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*first, text],
        "pair": [*first, text, second],
        "special_tokens": {
            text: {"id": text, "ids": [number], "tokens": [text]} for text, number in begin.items()
        },
    }
    return description


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    processor = tokenizer.processor
    numbers = range(tokenizer.vocab_size)
    pieces = [processor.id_to_piece(number) for number in numbers]
    special = {n for n in numbers if processor.is_control(n) or processor.is_unknown(n)}
    special |= tokenizer.special.ids
    normal = {
        piece: number
        for number, piece in enumerate(pieces)
        if number not in special
        and not processor.is_byte(number)
        and not processor.is_unused(number)
    }
    # SentencePiece joins the neighbours whose joint piece has the best score.
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(normal, key=lambda piece: -processor.get_score(normal[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    unknown = processor.id_to_piece(processor.unk_id()) if processor.unk_id() >= 0 else None
    description = _byte_fallback(pieces, special, unknown, merges)
    description["normalizer"] = _replace(" ", _SPACE)
    return description


def _byte_fallback(
    pieces: list[str], special: set[int], unknown: str | None, merges: list[list[str]]
) -> dict[str, Any]:
    """A BPE model that takes unknown characters as bytes, and U+2581 for a space."""
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": pieces[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number in sorted(special)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}
