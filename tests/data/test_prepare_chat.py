"""`prepare --format=chat`: stores that say what is scored, made as other stores are."""

import datetime
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from stem_jax.data import assembly, chat_template, piece_encoder, prepare_job
from stem_jax.data.chat_template import load_chat
from stem_jax.data.conversations import conversation_text, encode_conversation
from stem_jax.data.preparation import Preparation
from stem_jax.data.prepare import open_stores
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.prepare import main
from tests.chat_templates import TEMPLATES, write_chat
from tests.tokenizer_kinds import write_kind

ROOT = Path(__file__).parents[2]


def _conversation(number):
    asked = {"role": "user", "content": f"What is {number} and {'one ' * (number % 5)}?"}
    return [asked, {"role": "assistant", "content": f"It is {number}."}] * (1 + number % 3)


def _write(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _flags(source, folder, out):
    tokenizer = ["--tokenizer=hf", f"--tokenizer-path={folder / 'tokenizer.json'}"]
    return [f"--input={source}", f"--out={out}", "--format=chat", *tokenizer, "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat("qwen", tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def source(tmp_path):
    return _write(tmp_path / "chats.jsonl", [{"messages": _conversation(n)} for n in range(60)])


def _bytes_in(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "tokenizer_meta.json"
    }


def test_the_stores_hold_ids_and_what_is_scored(tmp_path, folder, source, capsys):
    out = tmp_path / "out"
    main([*_flags(source, folder, out), "--validation-fraction=0.2"])
    told = json.loads(capsys.readouterr().out)
    assert told["documents"] == 60
    chat = load_chat(load_tokenizer_folder(out / "tokenizer"))
    stores = open_stores(out, chat.tokenizer)
    found = {}
    for store in stores.values():
        assert store.scored is not None and store.scored.dtype == bool
        assert TokenStore.open(store.folder, verify=True).meta.has_scored
        for index in range(store.num_documents):
            start, stop = store.document_starts[index : index + 2]
            ids = tuple(store.document_ids(index).tolist())
            found[ids] = store.scored[start:stop].tolist(), int(store.document_bytes[index])
    expected = {}
    for number in range(60):
        made = encode_conversation(chat, conversation_text({"messages": _conversation(number)}))
        expected[tuple(made.ids.tolist())] = made.scored.tolist(), made.num_bytes
    assert found == expected
    assert told["bytes"] == sum(size for _, size in expected.values())
    assert told["scored_tokens"] == sum(sum(scored) for scored, _ in expected.values())
    assert told["bytes_per_token"] == round(told["bytes"] / told["scored_tokens"], 4)


def test_rows_score_what_the_store_says(tmp_path, folder, source):
    main([*_flags(source, folder, tmp_path / "out"), "--validation-fraction=0"])
    store = TokenStore.open(tmp_path / "out" / "train")
    length = 40
    masks = [store.row(i, length)["loss_mask"] for i in range(store.num_rows(length, False))]
    whole = np.concatenate(masks)[: store.num_tokens - 1]
    assert np.array_equal(whole, store.scored[1:])
    assert 0.1 < whole.mean() < 0.7


def test_a_store_of_conversations_is_refused_by_programs_that_do_not_know_of_it(
    tmp_path, folder, source
):
    """Earlier ones refuse fields that they do not know; stores of texts have none that is new."""
    main([*_flags(source, folder, tmp_path / "out"), "--validation-fraction=0"])
    assert json.loads((tmp_path / "out/train/meta.json").read_text())["has_scored"] is True
    text = tmp_path / "x.txt"
    text.write_text("text")
    main([f"--input={text}", "--tokenizer=bytes", f"--out={tmp_path}/t", "--validation-fraction=0"])
    assert "has_scored" not in json.loads((tmp_path / "t/train/meta.json").read_text())
    assert not (tmp_path / "t/train/scored.bin").exists()
    assert TokenStore.open(tmp_path / "t/train").scored is None


def test_damage_to_what_is_scored_is_found(tmp_path, folder, source):
    out = tmp_path / "out"
    main([*_flags(source, folder, out), "--validation-fraction=0"])
    path = out / "train" / "scored.bin"
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    path.write_bytes(raw)
    TokenStore.open(out / "train")
    with pytest.raises(InputError, match=r"scored\.bin does not match its checksum"):
        main(["--verify", f"--out={out}"])
    path.write_bytes(raw[:-1])
    with pytest.raises(InputError, match=r"scored\.bin has \d+ bytes where its meta\.json needs"):
        TokenStore.open(out / "train")


def test_packed_files_arrays_and_processes_give_the_same_stores(
    tmp_path, folder, source, monkeypatch
):
    monkeypatch.setattr(piece_encoder, "PIECE_CHARS", 1500)
    main([*_flags(source, folder, tmp_path / "one"), "--processes=1"])
    packed = _write(tmp_path / "chats.data.gz", [{"messages": _conversation(n)} for n in range(60)])
    main([*_flags(packed, folder, tmp_path / "two"), "--processes=2"])
    array = tmp_path / "chats.json"
    array.write_text(json.dumps([{"messages": _conversation(n)} for n in range(60)]))
    main([*_flags(array, folder, tmp_path / "three"), "--processes=1"])
    one, two, three = (_bytes_in(tmp_path / name) for name in ("one", "two", "three"))
    for name in ("train", "validation"):
        for file in ("tokens.bin", "documents.bin", "bytes.bin", "scored.bin"):
            key = f"{name}/{file}"
            assert one[key] == two[key] == three[key]


def _stopped_after_five(flags: list[str]) -> None:
    """Prepares, and is interrupted when five pieces are there."""
    add, added = assembly.Assembly.add, []

    def stopped(self, index, content):
        add(self, index, content)
        added.append(index)
        if len(added) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembly.Assembly, "add", stopped)
        main(flags)


def test_it_goes_on_after_a_kill(tmp_path, folder, source, monkeypatch, capsys):
    monkeypatch.setattr(piece_encoder, "PIECE_CHARS", 1500)
    monkeypatch.setattr(assembly, "_RECORD_SECONDS", 0.0)
    flags = [*_flags(source, folder, tmp_path / "out"), "--processes=1"]
    main([*_flags(source, folder, tmp_path / "whole"), "--processes=1"])
    _stopped_after_five(flags)
    capsys.readouterr()
    main(flags)
    assert json.loads(capsys.readouterr().out)["resumed_pieces"] == 5
    assert _bytes_in(tmp_path / "out") == _bytes_in(tmp_path / "whole")


class _Tomorrow(chat_template.datetime):
    """Another day."""

    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=1)


def test_a_date_is_that_of_the_start(tmp_path, source, monkeypatch, capsys):
    """Of a template that writes dates: also when it goes on the day after a kill."""
    folder = write_chat("llama3_tools", tmp_path / "model")
    monkeypatch.setattr(piece_encoder, "PIECE_CHARS", 1500)
    monkeypatch.setattr(assembly, "_RECORD_SECONDS", 0.0)
    out = tmp_path / "out"
    flags = [*_flags(source, folder, out), "--processes=1"]
    today = chat_template.datetime.now()
    _stopped_after_five(flags)
    for module in (chat_template, prepare_job):
        monkeypatch.setattr(module, "datetime", _Tomorrow)
    capsys.readouterr()
    main(flags)
    assert json.loads(capsys.readouterr().out)["resumed_pieces"] == 5
    tokenizer = load_tokenizer_folder(out / "tokenizer")

    def dates() -> set[str]:
        store = TokenStore.open(out / "train")
        texts = [tokenizer.decode(store.document_ids(i)) for i in range(store.num_documents)]
        return {line for text in texts for line in text.splitlines() if "Today Date" in line}

    days = {f"Today Date: {today.strftime('%d %b %Y')}"}
    assert dates() == days
    # What is prepared anew is of its own day.
    main(flags)
    assert json.loads(capsys.readouterr().out)["resumed_pieces"] == 0
    assert dates().isdisjoint(days)


def test_another_template_begins_anew(tmp_path, folder, source, monkeypatch, capsys):
    monkeypatch.setattr(piece_encoder, "PIECE_CHARS", 1500)
    out, other = tmp_path / "out", tmp_path / "other.jinja"
    other.write_text(TEMPLATES["qwen"][1].replace("a helpful", "an"))
    publish = Preparation.publish
    monkeypatch.setattr(Preparation, "publish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*_flags(source, folder, out), "--processes=1"])
    monkeypatch.setattr(Preparation, "publish", publish)
    capsys.readouterr()
    main([*_flags(source, folder, out), "--processes=1", f"--chat-template={other}"])
    assert json.loads(capsys.readouterr().out)["resumed_pieces"] == 0
    tokenizer = load_tokenizer_folder(out / "tokenizer")
    assert tokenizer.chat_template == other.read_text()
    assert "You are an assistant." in tokenizer.decode(
        open_stores(out, tokenizer)["train"].document_ids(0)
    )


def test_bad_records_are_left_out_and_listed(tmp_path, folder, capsys):
    good = {"messages": _conversation(1)}
    bad = [
        {"messages": []},
        {"messages": [{"role": "user", "content": "Hi <|im_end|>"}, good["messages"][1]]},
        {"text": "no conversation"},
        {"messages": [*good["messages"], {"role": "robot", "content": "x"}]},
    ]
    source = _write(tmp_path / "chats.jsonl", [good, *bad, {"messages": _conversation(2)}])
    with pytest.raises(InputError, match=r"chats\.jsonl:2: there are no messages"):
        main(_flags(source, folder, tmp_path / "out"))
    flags = ["--on-bad=skip", "--validation-fraction=0"]
    main([*_flags(source, folder, tmp_path / "out"), *flags])
    told = json.loads(capsys.readouterr().out)
    assert (told["documents"], told["skipped_records"]) == (2, 4)
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    for place, reason in ((2, "no messages"), (3, "special token"), (4, "'messages'"), (5, "rob")):
        assert any(f":{place}: " in told and reason in told for told in reasons), reasons


def test_wrong_flags_and_tokenizers_without_a_template(tmp_path, source, capsys):
    plain = write_kind("gpt2", tmp_path / "gpt2")
    with pytest.raises(InputError, match="no chat template: give one with --chat-template=FILE"):
        main(_flags(source, plain, tmp_path / "out"))
    for flags, message in (
        (["--corpus=facts"], "--format=chat takes --input"),
        (["--chat-template=x", "--format=jsonl"], "--chat-template is of --format=chat"),
    ):
        with pytest.raises(SystemExit):
            main([*_flags(source, plain, tmp_path / "out"), *flags])
        assert message in capsys.readouterr().err
    parquet = tmp_path / "x.parquet"
    parquet.write_bytes(b"PAR1 and more")
    with pytest.raises(InputError, match="is Parquet: write its conversations as JSON lines"):
        main([*_flags(parquet, write_chat("qwen", tmp_path / "q"), tmp_path / "out")])


def test_a_template_that_rewrites_stops_it_also_with_skip(tmp_path, folder, source):
    path = tmp_path / "rewrites.jinja"
    path.write_text("{{ messages | length }}" + TEMPLATES["qwen"][1])
    with pytest.raises(InputError, match=r"chats\.jsonl:1: chat template .*rewrites\.jinja writes"):
        main(
            [*_flags(source, folder, tmp_path / "out"), f"--chat-template={path}", "--on-bad=skip"]
        )
    assert not (tmp_path / "out" / "train").exists()
