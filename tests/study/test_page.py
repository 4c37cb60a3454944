"""The page of made-up results: whole, escaped, honest about what is missing, fit for a phone."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from configs.study.claims import CLAIMS
from stem_jax.study.markdown import markdown_of, picture_files
from stem_jax.study.numbers import bounded, count, interval, plain, signed
from stem_jax.study.page import page_of, write_page
from stem_jax.study.pictures import Bar, Line, bars, lines
from stem_jax.study.results import results_of, results_text
from stem_jax.study.sections import difference_picture
from tests.browser import NAMES, find_browser, open_page
from tests.study_records import study_records

COST = {
    "machine": {"cpu": "a CPU"},
    "rounds": 20,
    "variants": {
        "dense": {"tokens_per_second": 4850.0, "time_ratio": [1.0, 0.98, 1.02]},
        "hash_moe": {"tokens_per_second": None, "time_ratio": None},
    },
}


@pytest.fixture(scope="module")
def results():
    """As they are read from study.json."""
    records = study_records()
    for one in records:
        if one["name"] == "prose.gate.n4000.r1.s2":
            one["diverged"] = 1234
    asked = [*(r["name"] for r in records), *(f"prose.up_add.n4000.r1.s{s}" for s in (1, 2))]
    says = {"dense": "No table.", "stem_half": "Rows <in> every other layer."}
    found = results_of(records, CLAIMS, "core", overlaps=[0.1, 0.2], asked=asked, variants=says)
    return json.loads(results_text(found))


@pytest.fixture(scope="module")
def page(results):
    return page_of(results, COST)


def _text(page):
    plain_text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(plain_text))


def test_the_answer_stands_before_all_pictures(page, results):
    verdicts = [claim["verdict"] for claim in results["claims"]]
    said = ", ".join(f"{verdicts.count(v)} {v}" for v in ("confirmed", "refuted", "unresolved"))
    assert f"8 claims were written down before the first run: {said}." in _text(page)
    answer = page[page.index('<section class="answer">') : page.index("<nav")]
    for claim in CLAIMS:
        assert claim.says.replace("'", "&#x27;") in answer
    assert page.index("<nav") < page.index("<svg")
    # Each under its verdict.
    lists = dict(re.findall(r'<dt class="(\w+)">\w+</dt>(.*?)(?=<dt|</dl>)', answer))
    for claim in results["claims"]:
        assert claim["says"].replace("'", "&#x27;") in lists[claim["verdict"]]


def test_the_page_fetches_and_runs_nothing(page):
    assert "<script" not in page and "://" not in page and "<img" not in page
    assert "default-src 'none'" in page


def test_what_went_wrong_is_said(page, results):
    text = _text(page)
    assert "Diverged: prose.gate.n4000.r1.s2 (step 1,234)." in text
    assert ", 1 diverged" in text and "gate diverged with seed 2" in text
    assert "2 runs were asked for and are not there." in text
    assert "prose.up_add.n4000.r1 2" in text
    assert "Not measurable at this size: spikes of the loss on prose (all at the floor)" in text
    assert "Mixed code" not in text
    mixed = {**results, "commits": {"a": ["x"], "b": ["y"]}}
    assert "Mixed code" in page_of(mixed, None)


def test_parts_without_figures_are_left_out(page, results):
    assert "Speed and memory" in page and "Speed and memory" not in page_of(results, None)
    text = _text(page)
    assert "4.85 k 1.00 (0.98 to 1.02)" in text and "hash moe – –" in text
    empty = page_of(results_of([], CLAIMS, "core"), None)
    assert "no run has ended yet" in empty and "<svg" not in empty
    unclaimed = _text(page_of(results_of(study_records(), (), "core"), None))
    assert unclaimed.count("all figures here are exploratory") == 1
    assert _text(empty).count("None yet") == 1


def test_sizes_are_said_of_what_they_are_matched_with(page):
    text = _text(page)
    assert "in brackets, of dense's" in text and "in brackets, of stem half's" in text
    assert "stem half 3.00 k (300.0%) 800 (80.0%)" in text
    assert "dense 1.00 k (33.3%) 1.00 k (125.0%)" in text


def test_every_text_is_escaped(page):
    assert "Rows &lt;in&gt; every other layer." in page


def test_pictures_are_svg_with_a_text_in_their_place(page):
    drawn = re.findall(r"<svg class=\"(?:wide|narrow)\".*?</svg>", page, re.DOTALL)
    # Two panels with bits, two multipliers, a gap, two frequencies, curves; wide and narrow.
    assert len(drawn) == 2 * 8
    for one in drawn:
        root = ElementTree.fromstring(one)
        assert root.get("role") == "img" and root.find("title").text
        assert len(root.get("aria-label")) > len(root.find("title").text)
        assert "nan" not in one and "inf" not in one.replace("inference", "")
        width = float(root.get("viewBox").split()[2])
        for mark in root.iter("circle"):
            assert 0 <= float(mark.get("cx")) <= width
    label = ElementTree.fromstring(drawn[0]).get("aria-label")
    assert re.search(r"stem half: −0\.0\d{3}\s±\s0\.0\d{3}", label), label


def _bars(rows, **given):
    options = {"less_is_better": True, **given}
    figure = bars("T", rows, 0.0, ("better", "worse"), "unit", "caption", **options)
    wide = re.search(r"<svg class=\"wide\".*?</svg>", figure, re.DOTALL)[0]
    return ElementTree.fromstring(wide)


def test_bars_lie_where_their_values_are():
    rows = [Bar("a", -0.02, -0.03, -0.01, "a"), Bar("b", 0.01, None, None, "b", [0.0, 0.02])]
    root = _bars(rows, margin=0.005)
    dots = {float(c.get("cx")): c for c in root.iter("circle") if c.get("r") == "4.5"}
    left, right = sorted(dots)
    small = sorted(float(c.get("cx")) for c in root.iter("circle") if c.get("r") == "2")
    scale = (right - left) / 0.03
    assert small == pytest.approx([right - 0.01 * scale, right + 0.01 * scale], abs=0.2)
    (axis,) = [one for one in root.iter("line") if one.get("class") == "axis"]
    assert float(axis.get("x1")) == pytest.approx(left + 0.02 * scale, abs=0.2)
    (band,) = root.iter("rect")
    assert float(band.get("width")) == pytest.approx(0.01 * scale, abs=0.2)
    ticks = {
        one.text: float(one.get("x")) for one in root.iter("text") if one.get("class") == "soft"
    }
    assert ticks["−0.02"] == pytest.approx(left, abs=0.2)


def test_colours_say_which_way_and_arrows_what_is_a_bound():
    for low, high, less, kind in (
        (-0.03, -0.01, True, "better"),
        (0.01, 0.03, True, "worse"),
        (0.01, 0.03, False, "better"),
        (-0.01, 0.03, True, "none"),
        (0.01, 0.03, None, "none"),
    ):
        root = _bars([Bar("a", (low + high) / 2, low, high, "")], less_is_better=less)
        (dot,) = root.iter("circle")
        assert dot.get("class") == kind
        assert list(root.iter("polyline")) == []
    root = _bars([Bar("a", 0.02, 0.01, 0.03, "", (), ("high",))])
    assert len(list(root.iter("polyline"))) == 1


def test_lines_differ_without_colours():
    series = [Line(str(n), [(0.0, float(n)), (1.0, float(n))], n) for n in range(12)]
    figure = lines("T", series, "x", "y", "c")
    root = ElementTree.fromstring(re.search(r"<svg class=\"wide\".*?</svg>", figure)[0])
    looks = []
    for group in root.iter("g"):
        path, mark = group[0], group[1]
        looks.append((path.get("stroke-dasharray"), mark.tag))
    assert len(set(looks)) == len(looks) == 12


def test_figures_read_as_they_should():
    assert (plain(None), plain(-1.25, 1), signed(0.00004)) == ("–", "−1.2", "+0.0000")
    both = {"mean": -0.02, "half_width": 0.001}
    assert interval(both).replace("\N{NO-BREAK SPACE}", " ") == "−0.0200 ± 0.0010"
    assert interval({"mean": 0.02, "half_width": None}) == "+0.0200, one seed: no interval"
    assert [count(x) for x in (None, 12, 999.6, 4_000_000, 2.5e15)] == [
        "–",
        "12",
        "1.00 k",
        "4.00 M",
        "2.50 P",
    ]
    assert bounded(1.5, "at least") == "at least 1.50" and bounded(1.5, "") == "1.50"


def test_markdown_and_picture_files(results):
    text = markdown_of(results)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1
    assert "| stem half |" in text and "**Compute multipliers" in text
    files = picture_files(results)
    assert {"gap.svg", "curves.svg", "differences_prose_4000.svg"} <= set(files)
    for drawn in files.values():
        root = ElementTree.fromstring(drawn)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in drawn


@pytest.mark.long
@pytest.mark.skipif(find_browser() is None, reason=f"needs one of {', '.join(NAMES)}")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_has_nothing_to_complain_about(results, tmp_path, width):
    write_page(results, COST, tmp_path / "study.html")
    folder = tmp_path / "browser"
    folder.mkdir()
    opened = open_page(find_browser(), tmp_path / "study.html", folder, width)
    assert (opened.console, opened.fetched, opened.wide) == ([], [], 0)


def test_dense_stands_beside_differences_with_the_seeds_of_these(results):
    """More of its seeds, as there are for the dense model against itself, are in none of them."""
    panel = json.loads(json.dumps(results["panels"][0]))
    (dense,) = (one for one in panel["variants"] if one["variant"] == panel["against"])
    values = dense["measures"]["test_bits_per_byte"]["values"]
    paired = [value for seed, value in values.items() if int(seed) <= 5]
    values["1000"] = 50.0
    dense["measures"]["test_bits_per_byte"]["mean"] = 10.0
    said = f"Dense itself needs {plain(sum(paired) / len(paired))} bits per byte."
    assert said in difference_picture(panel, "test_bits_per_byte")


def test_models_that_were_not_run_are_said_to_be_none(results):
    says = {"dense": "No table.", "nobody": "Never trained."}
    text = _text(page_of(results | {"variants": says}, None))
    assert "Never trained. Not run." in text and "No table. Not run." not in text
