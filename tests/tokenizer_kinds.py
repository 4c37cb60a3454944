"""Small tokenizers of the kinds that people ship, with the files beside them.

Each is trained with the `tokenizers` library, and has the normalizer, pre-tokenizer, decoder,
post-processor and special tokens of the one that it is named after.
"""

import functools
import io
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from stem_jax.data.corpora import read_corpus
from stem_jax.data.tokenizer import Tokenizer, load_tokenizer

MARK = "\u2581"
CORPUS = [
    *(topics[name] for name in sorted(topics)[40:52]),
    *list(read_corpus("facts"))[:150],
    "Żółta łódź, naïve café; Straße – größer. “Quoted”, ‘so’… Ελληνικά, русский текст, 日本語の文。"
    * 8,
    "<h1>a title</h1> </s> <s> <|im_end|> <unk> 2026, 3.14; x_1 = [y]; (z)!? " * 8,
]
_PIECES = 700
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
KINDS = (
    "llama2",
    "llama3_instruct",
    "gpt2",
    "gemma",
    "chatml",
    "smollm2",
    "deepseek",
    "unigram",
)


def write_kind(kind: str, folder: Path) -> Path:
    """Writes the files of a kind into a folder, which is made; returns it.

    config.json has the special ids and the vocabulary alone, for a test to complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files(kind).items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text, "utf-8")
    return folder


def load_kind(kind: str, folder: Path, as_shipped: bool = False) -> Tokenizer:
    """Our tokenizer of a kind, from files in a folder."""
    write_kind(kind, folder)
    return load_tokenizer("hf", folder / "tokenizer.json", as_shipped=as_shipped)


def special_texts(kind: str) -> list[str]:
    """The texts of all tokens that a kind adds, those of ordinary ones among them."""
    return [token["content"] for token in _files(kind)["tokenizer.json"]["added_tokens"]]


def write_dummy_prefix_model(path: Path, **options: Any) -> Path:
    """A SentencePiece model as Llama 2's: texts begin with a space of its own."""
    model = io.BytesIO()
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n") if line),
        model_writer=model,
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **{**settings, **options},
    )
    path.write_bytes(model.getvalue())
    return path


@functools.cache
def _files(kind: str) -> dict[str, Any]:
    return {
        "llama2": _llama2,
        "llama3_instruct": _llama3_instruct,
        "gpt2": _gpt2,
        "gemma": _gemma,
        "chatml": _chatml,
        "smollm2": _smollm2,
        "deepseek": _deepseek,
        "unigram": _unigram,
    }[kind]()


def _llama2() -> dict[str, Any]:
    vocabulary, merges = _trained(_words(), ["<unk>", "<s>", "</s>", *_BYTES])
    built = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
    )
    built.decoder = decoders.Sequence(
        [*_fallback_decoders(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens([_token(text) for text in ("<unk>", "<s>", "</s>")])
    _begin_with(built, "<s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _folder(built, {**names, "add_bos_token": True}, stops=["</s>"])


def _llama3_instruct() -> dict[str, Any]:
    built = _byte_level([pre_tokenizers.Split(Regex(_LLAMA3), "isolated")], ignore_merges=True)
    built.add_special_tokens(
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|reserved_special_token_0|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ]
    )
    _begin_with(built, "<|begin_of_text|>")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    stops = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return _folder(built, {**names, "chat_template": _HEADERS}, stops, generation=sampled)


def _gpt2() -> dict[str, Any]:
    # Its only special token is a token of the model as well.
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = _trained(pre_tokenizer, [], alphabet=True)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    built = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer, built.decoder = pre_tokenizer, decoders.ByteLevel()
    built.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    built.add_special_tokens(["<|endoftext|>"])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return _folder(built, names, stops=["<|endoftext|>"], bos="<|endoftext|>")


def _gemma() -> dict[str, Any]:
    """Its vocabulary holds HTML tags, `</s>` among them, as ordinary tokens."""
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tags = ["\n\n", "<h1>", "</h1>", "<s>", "</s>", "<strong>"]
    vocabulary, merges = _trained(_words(), [*first, *tags, *_BYTES])
    built = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    built.normalizer = normalizers.Replace(" ", MARK)
    built.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    built.decoder = decoders.Sequence([*_fallback_decoders(), decoders.Fuse()])
    built.add_special_tokens([_token(text) for text in first])
    built.add_tokens([_token(text, special=False) for text in tags])
    _begin_with(built, "<bos>")
    names = {name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return _folder(
        built, {**names, "add_bos_token": True}, stops=["<eos>", "<end_of_turn>"], bos="<bos>"
    )


def _chatml() -> dict[str, Any]:
    """No bos; config.json names one all the same, and a vocabulary that is padded."""
    built = _byte_level([pre_tokenizers.Split(Regex(_QWEN), "isolated")])
    built.normalizer = normalizers.NFC()
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    built.add_tokens([_token("<tool_call>", special=False)])
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings = {**names, "add_bos_token": False, "chat_template": _CHATML}
    stops = ["<|im_end|>", "<|endoftext|>"]
    return _folder(built, settings, stops, bos="<|endoftext|>", padding=17)


def _smollm2() -> dict[str, Any]:
    built = _byte_level(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    settings = {**names, "unk_token": "<|endoftext|>", "chat_template": _CHATML}
    return _folder(built, settings, stops=["<|im_end|>"], bos="<|im_start|>")


def _deepseek() -> dict[str, Any]:
    """Names beyond ASCII; turns are marked by tokens that are not special."""
    built = _byte_level(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥ぁ-ゖァ-ヺ]+"), "isolated"),
            pre_tokenizers.Split(
                Regex(
                    r"[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
                    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
        ]
    )
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    built.add_special_tokens([begin, end, "<｜▁pad▁｜>"])
    built.add_tokens([_token(text, special=False) for text in ("<｜User｜>", "<｜Assistant｜>")])
    described = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False}
    names = {
        "bos_token": {**described, "content": begin, "single_word": False},
        "eos_token": {**described, "content": end, "single_word": False},
    }
    return _folder(built, {**names, "add_bos_token": True}, stops=[end], bos=begin)


def _unigram() -> dict[str, Any]:
    """Its model holds the special tokens as pieces, and has none for most characters."""
    built = tokenizers.Tokenizer(models.Unigram())
    built.pre_tokenizer = _words()
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=names, unk_token="<unk>", show_progress=False
    )
    built.train_from_iterator(CORPUS, trainer)
    built.pre_tokenizer, built.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    end = built.token_to_id("</s>")
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", built.token_to_id("<s>")), ("</s>", end)],
    )
    settings = {f"{name.strip('</>')}_token": name for name in ("<pad>", "<unk>")}
    settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    return _folder(built, settings, stops=["</s>"], bos="<s>")


def _words():
    """What SentencePiece trains on: no piece holds a space inside, nor letters and punctuation."""
    return pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])


def _trained(
    pre_tokenizer, first: list[str], alphabet: bool = False
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte pair encoding."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=_PIECES + len(first),
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    built.train_from_iterator(CORPUS, trainer)
    model = json.loads(built.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _byte_level(parts: list, **options: Any) -> tokenizers.Tokenizer:
    last = [] if isinstance(parts[-1], pre_tokenizers.ByteLevel) else [False]
    parts = parts + [pre_tokenizers.ByteLevel(add_prefix_space=one, use_regex=one) for one in last]
    pre_tokenizer = pre_tokenizers.Sequence(parts)
    built = tokenizers.Tokenizer(models.BPE(*_trained(pre_tokenizer, [], alphabet=True), **options))
    built.pre_tokenizer, built.decoder = pre_tokenizer, decoders.ByteLevel()
    return built


def _fallback_decoders() -> list:
    return [decoders.Replace(MARK, " "), decoders.ByteFallback()]


def _token(text: str, special: bool = True) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, special=special, normalized=False)


def _begin_with(built: tokenizers.Tokenizer, text: str) -> None:
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{text} $A", special_tokens=[(text, built.token_to_id(text))]
    )


def _folder(
    built: tokenizers.Tokenizer,
    settings: dict[str, Any],
    stops: list[str],
    bos: str | None = None,
    padding: int = 0,
    generation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The files of a folder. stops: all that end a completion, the first also in config.json."""

    def number(text: str) -> int:
        return built.token_to_id(text)

    texts = {name: value for name, value in settings.items() if name.endswith("s_token")}
    ids: dict[str, Any] = {"eos_token_id": [number(text) for text in stops]}
    if bos is None and isinstance(settings.get("bos_token"), str):
        bos = settings["bos_token"]
    if bos is not None:
        ids["bos_token_id"] = number(bos)
    if len(stops) == 1:
        ids["eos_token_id"] = number(stops[0])
    return {
        "tokenizer.json": json.loads(built.to_str()),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **settings},
        "special_tokens_map.json": {name: text for name, text in texts.items() if text},
        "generation_config.json": {**ids, **(generation or {})},
        "config.json": {
            **ids,
            "eos_token_id": number(stops[0]),
            "vocab_size": built.get_vocab_size(with_added_tokens=True) + padding,
        },
    }
