"""stem_jax.analyze: pages that a browser opens, figures of rows wherever they lie, refusals."""

import base64
import html
import json
import re

import numpy as np
import pytest

from stem_jax import analyze, cli
from stem_jax.analysis import analysis
from stem_jax.analysis.flop_check import FlopCheck
from stem_jax.analysis.geometry import Spread
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.tables.spec import logical
from stem_jax.training.state import init_state
from tests.browser import NAMES, find_browser, open_page
from tests.offloading import row_threads
from tests.saved_models import CONTEXT, SIZES, save_run, trained_state

MODELS = {
    "stem": {},
    "dense": {"model.stem_layers": "none"},
    "tied": {"model.stem_layers": (1,), "model.tie_embeddings": True},
}
NASTY = '<script>console.error("ran")</script> & "quoted"'


@pytest.fixture(scope="module")
def folder_of(train_step, make_batch, tmp_path_factory):
    """A function of a name in MODELS: a work folder, with metrics."""
    made = {}

    def make(name):
        if name in made:
            return made[name]
        step = train_step(**{**SIZES, **MODELS[name]})
        folder = tmp_path_factory.mktemp(name)
        save_run(folder, step, trained_state(step, make_batch))
        _write_metrics(folder, tables=name != "dense")
        made[name] = folder
        return folder

    return make


def _write_metrics(folder, tables):
    lines = []
    for step in range(1, 41):
        record = {"step": step, "train/loss": 5 / step + 0.1, "train/grad_norm": 1.0 + 1 / step}
        record |= {"train/table_grad_norm": 0.5} if tables else {}
        lines.append(json.dumps(record) + "\n")
    lines.insert(30, json.dumps({"step": 30, "eval/loss": 1.0}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of several thousand bytes, in which some are frequent and most are never seen."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(
        "the tables of a model hold what it knows".split(), 3000
    )
    path.write_text(" ".join(words.tolist()))
    return path


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Programs are compiled for their FLOPs in test_cost; here they are taken as counted."""
    checks = [
        FlopCheck(program, layers, 1000, 50, 15, 5, 1080)
        for layers in ((), (0,))
        for program in ("prefill", "decode", "training")
    ]
    monkeypatch.setattr(analysis, "check_cost", lambda config: checks)


@pytest.fixture
def run(text, capsys):
    def run(workdir, *more):
        argv = [f"--workdir={workdir}", f"--text={text}", "--no-progress", *more]
        analyze.main(argv)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def browser():
    found = find_browser()
    if found is None:
        pytest.skip(f"no {', '.join(NAMES)} to open a page with; .ci/run installs one")
    return found


def test_the_browser_tells_what_is_wrong(browser, tmp_path):
    policy = '<meta http-equiv="Content-Security-Policy" content="img-src data:">'
    page, afar = tmp_path / "page.html", "http://127.0.0.1:47123/x.png"
    page.write_text(
        f'<!doctype html><html><head>{policy}</head><body><div style="width: 3000px">wide</div>'
        f'<img alt="broken" src="data:image/png;base64,AAAA"><img alt="afar" src="{afar}">'
        "</body></html>"
    )
    opened = open_page(browser, page, tmp_path)
    assert [(alt, width) for alt, _, width in opened.pictures] == [("broken", 0), ("afar", 0)]
    assert opened.wide > 1500
    assert afar in opened.fetched
    assert "violates the following Content Security Policy" in opened.console[0]


@pytest.mark.long
def test_a_browser_opens_the_page(folder_of, run, browser, tmp_path):
    workdir = folder_of("stem")
    (workdir / "editing").mkdir()
    table = {"title": NASTY, "columns": ["edit", "done"], "rows": [["a => b", 0.5]], "note": "of 8"}
    (workdir / "editing" / "swaps.json").write_text(json.dumps(table))
    out = tmp_path / "out"
    said = run(workdir, f"--dense-workdir={folder_of('dense')}", f"--out={out}")
    assert "Wider angular spread of rows" in said and f"{out / 'index.html'}" in said
    opened = open_page(browser, out / "index.html", tmp_path)
    assert opened.console == []
    assert opened.fetched == [] or all(name.startswith("data:") for name in opened.fetched)
    files = sorted(path.name for path in out.glob("*.png"))
    assert len(opened.pictures) == len(files) == 2 + 2 + 2 + 1 + 1 + 2
    for alt, loaded, width in opened.pictures:
        assert loaded and width > 500, alt
    # What is wider than a window scrolls inside itself.
    phone = tmp_path / "phone"
    phone.mkdir()
    assert open_page(browser, out / "index.html", phone, width=500).wide == 0
    page = (out / "index.html").read_text()
    assert html.escape(NASTY) in page and NASTY not in page
    # The pictures of the page are the files beside it; nothing comes from elsewhere.
    inside = re.findall(r'src="([^"]*)"', page)
    assert all(source.startswith("data:image/png;base64,") for source in inside)
    pngs = {base64.b64decode(source.partition(",")[2]) for source in inside}
    assert pngs == {(out / name).read_bytes() for name in files}
    assert all(link[0] == "#" or link == "data:," for link in re.findall(r'href="([^"]*)"', page))
    assert "http://" not in page and "https://" not in page


def test_the_figures_are_those_of_the_rows(folder_of, run, text, tmp_path):
    workdir = folder_of("stem")
    argv = [f"--dense-workdir={folder_of('dense')}", "--json"]
    record = json.loads(run(workdir, *argv, f"--out={tmp_path}"))
    assert record == json.loads((tmp_path / "analysis.json").read_text())
    loaded = load_run(workdir)
    seen = sorted({*text.read_bytes(), 256})
    assert record["text"]["distinct_tokens"] in (len(seen), len(seen) + 1)
    geometry = record["geometry"]["rows"]
    assert [layer["layer"] for layer in geometry] == [0, 2]
    # Small enough that the sample is all of it.
    places = loaded.rows["stem"].spec.layout.row_numbers(np.array(seen))
    rows = logical(np.asarray(loaded.rows["stem"].rows))[places]
    for index, layer in enumerate(geometry):
        found = Spread.of(rows[:, index]).mean_abs_cosine
        assert layer["plain"]["mean_abs_cosine"] == pytest.approx(found, rel=1e-5)
    assert [layer["layer"] for layer in record["geometry"]["dense"]] == [0, 2]
    assert [layer["plain"]["vectors"] for layer in record["geometry"]["dense"]] == [len(seen)] * 2
    verdict = record["geometry"]["wider_angular_spread"]["plain"]
    assert verdict["layers"] == 2 and "confirmed" in verdict["verdict"]
    capacity = record["capacity"]["lengths"]
    assert capacity[0]["parameters"] == 2 * 48 and capacity[-1]["length"] > CONTEXT
    assert record["differences"] == []
    assert record["stability"]["run"]["tables"]["median"] == 0.5
    assert record["stability"]["dense"]["tables"] is None


def test_rows_on_the_host_are_the_same(folder_of, run, tmp_path):
    found = [
        json.loads(run(folder_of("stem"), "--json", f"--out={tmp_path / str(index)}", *more))
        for index, more in enumerate(([], ["--resident-rows=64"]))
    ]
    assert found[0]["geometry"] == found[1]["geometry"]
    assert found[0]["capacity"] == found[1]["capacity"]
    assert row_threads() == []


@pytest.mark.parametrize("name", ["dense", "tied"])
def test_every_kind_of_model_has_a_page(folder_of, run, name, tmp_path):
    said = run(folder_of(name), f"--out={tmp_path}")
    assert (tmp_path / "index.html").stat().st_size > 100_000
    record = json.loads((tmp_path / "analysis.json").read_text())
    if name == "dense":
        assert "This model has no tables" in said
        assert record["capacity"] is None and len(record["geometry"]["dense"]) == 3
    else:
        assert "takes a dense twin" in said
        assert record["geometry"]["wider_angular_spread"]["plain"] is None


def test_it_refuses_what_it_cannot_compare(folder_of, run, text, tmp_path, train_step):
    stem, dense = folder_of("stem"), folder_of("dense")
    with pytest.raises(InputError, match="--dense-workdir=nowhere does not exist"):
        run(stem, "--dense-workdir=nowhere", f"--out={tmp_path / 'a'}")
    with pytest.raises(InputError, match=r"has STEM layers 0,2; give a run .*stem_layers=none"):
        run(stem, f"--dense-workdir={stem}", f"--out={tmp_path / 'a'}")
    with pytest.raises(InputError, match="is dense itself and has no rows to compare"):
        run(dense, f"--dense-workdir={dense}", f"--out={tmp_path / 'a'}")
    # The same text in other pieces: ids that mean other words.
    model = tmp_path / "pieces.model"
    train_sentencepiece([text.read_text()], model, 300)
    step = train_step(**{**SIZES, "model.stem_layers": "none", "model.vocab_size": 300})
    state = init_state(step.blueprint)
    other = tmp_path / "other"
    save_run(other, step, state, tokenizer=load_tokenizer("sentencepiece", model))
    with pytest.raises(InputError, match=r"tokenizer \w{12}, .*: their ids stand for other words"):
        run(stem, f"--dense-workdir={other}", f"--out={tmp_path / 'a'}")


def test_it_refuses_bad_input(folder_of, run, tmp_path, capsys):
    stem = folder_of("stem")
    out = f"--out={tmp_path / 'out'}"
    with pytest.raises(InputError, match="nothing was trained there"):
        run(tmp_path)
    assert not (tmp_path / "analysis").exists()
    with pytest.raises(InputError, match=r"--tokens=10000000 is more than the \d+ tokens"):
        run(stem, out, "--tokens=10000000")
    with pytest.raises(InputError, match="--rows=1 must be at least 2"):
        run(stem, out, "--rows=1")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match="fewer than the 129 of one sequence"):
        run(stem, out, f"--text={short}")
    # Before the work: a run that is not even loaded.
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match=r"--out=.*file/out/.* is not a folder; choose another"):
        run(stem, f"--out={blocked / 'out'}")
    folder = stem / "editing"
    folder.mkdir(exist_ok=True)
    wrong = folder / "wrong.json"
    for content, reason in (("{", "is not JSON"), ('{"title": "a"}', "is no table of an edit")):
        wrong.write_text(content)
        with pytest.raises(InputError, match=reason):
            run(stem, out)
    wrong.unlink()
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda _: analyze.main([f"--workdir={tmp_path}"]))
    assert exit_.value.code == 1 and capsys.readouterr().err.count("\n") == 1
