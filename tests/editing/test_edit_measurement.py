"""Edits of a model that knows some countries: what it answers, and what the measurement says."""

import csv
import dataclasses
import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax import cli, edit, evaluate
from stem_jax.checkpoints.loading import load_run
from stem_jax.data import facts
from stem_jax.data.word_tokens import word_ids
from stem_jax.editing import cases as edit_cases
from stem_jax.editing import measurement as edit_measurement
from stem_jax.editing.cases import fact_cases
from stem_jax.editing.fluency import fluency, ngram_entropy
from stem_jax.editing.measurement import NOT_READ, EditOutcome, lay_edits, measure_edits
from stem_jax.editing.patch import edited_run, make_patch, read_rows
from stem_jax.editing.report import COLUMNS, format_csv, format_summary, summarize
from stem_jax.editing.swaps import swap_recipes
from stem_jax.editing.trial import Trial, TrialResult, try_edits
from stem_jax.errors import InputError
from stem_jax.evaluation.answers import Question, answer_all
from stem_jax.evaluation.recall import fact_prompt, format_recall, recall
from stem_jax.evaluation.scoring import Scorer
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.tables.overlaid_rows import SequenceKeys
from tests.facts_model import COUNTRIES, import_into, only_some_countries


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The committed model in a work folder, in a world of its countries."""
    folder = tmp_path_factory.mktemp("facts") / "run"
    with pytest.MonkeyPatch.context() as patch:
        only_some_countries(patch)
        import_into(folder)
        yield folder


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir)


@pytest.fixture(scope="module")
def cases(run):
    return fact_cases(run.tokenizer, pairs=12)


@pytest.fixture(scope="module")
def outcomes(run, cases):
    return measure_edits(run, cases, progress=False)


def share(values):
    values = list(values)
    return sum(values) / len(values)


def test_it_answers_what_it_was_told_also_in_other_words(run):
    found = recall(run, progress=False)
    assert found["countries"] == len(COUNTRIES) and set(found["relations"]) == set(facts.RELATIONS)
    for record in found["relations"].values():
        assert record["trained"] > 0.97 and record["held_out"] > 0.9
        assert record["questions"] == len(COUNTRIES) * 21
    assert "capital" in format_recall(found)
    with pytest.raises(InputError, match="--limit=0 must be at least 1"):
        recall(run, limit=0)


def test_facts_are_asked_for_by_the_entry_point(workdir, tmp_path, capsys):
    out = tmp_path / "facts.json"
    evaluate.main([f"--workdir={workdir}", "--facts", "--limit=3", f"--out={out}"])
    printed = capsys.readouterr().out
    assert "relation          trained  held out  questions  (answered exactly)" in printed
    record = json.loads(out.read_text())
    assert record["countries"] == 3 and record["relations"]["domain"]["questions"] == 3 * 21


@pytest.mark.long
def test_verdicts_are_those_of_greedy_decoding(run, cases):
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    prompts = [case.prompt for case in cases]
    texts = [x.text for x in generator.complete(prompts, 12, Sampling(0.0, 0, 1.0))]
    scorer = Scorer(run, 16)
    for pick in ("old", "new"):
        answers = [getattr(case, pick) for case in cases]
        questions = [Question(p, a, ".") for p, a in zip(prompts, answers)]
        for verdict, text, answer in zip(
            answer_all(scorer, run.tokenizer, questions), texts, answers
        ):
            assert verdict.exact == text.startswith(f" {answer}.")
            assert verdict.log_likelihood < 0
    # The end tells an answer from one that only begins like it.
    [verdict] = answer_all(scorer, run.tokenizer, [Question(prompts[0], cases[0].old[:2], ".")])
    assert not verdict.exact


def test_swaps_change_the_answers_and_embeddings_do_not(run, cases, outcomes):
    assert share(x.base for x in outcomes) > 0.97
    assert share(x.answer == "new" for x in outcomes) > 0.9
    assert share(x.preferred for x in outcomes) > 0.9
    assert share(y for x in outcomes for y in x.paraphrases) > 0.9
    assert share(y for x in outcomes for y in x.locality) > 0.9
    # A swap replaces all that is known of a subject, but for what both have alike.
    assert share(y for x in outcomes for y in x.specificity) < 0.25
    swapped = measure_edits(run, cases, written="embedding", progress=False)
    assert share(x.answer == "new" for x in swapped) < share(x.answer == "new" for x in outcomes)
    assert share(x.answer == "old" for x in swapped) > 0.5


def test_many_edits_at_once_are_what_each_is_alone(run, cases):
    chosen = cases[::25]
    recipes = [swap_recipes(run.tokenizer, case.swap) for case in chosen]
    for layers in (None, (1,)):
        laid = lay_edits(run, recipes, layers)
        scorer = Scorer(laid.run, 4)
        together = answer_all(
            scorer,
            run.tokenizer,
            [Question(c.prompt, c.new, c.end, keys) for c, keys in zip(chosen, laid.keys)],
        )
        for case, recipe, verdict in zip(chosen, recipes, together):
            alone = edited_run(run, [make_patch(run, recipe, layers=layers)])
            question = Question(case.prompt, case.new, case.end)
            [expected] = answer_all(Scorer(alone, 4), run.tokenizer, [question])
            assert verdict.exact == expected.exact
            assert verdict.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-5)


def test_what_does_not_name_the_subject_is_bit_equal(run):
    edited = edited_run(run, [make_patch(run, swap_recipes(run.tokenizer, "Spain=>Germany"))])
    [spain] = word_ids(run.tokenizer, "Spain")
    texts = [
        fact_prompt(template, country)
        for template in facts.FACT_TEMPLATES["capital"]
        for country in COUNTRIES
    ]
    sequences = [[run.tokenizer.bos_id, *run.tokenizer.encode(text)] for text in texts]
    before, after = (Scorer(x, 8).score(sequences) for x in (run, edited))
    for ids, old, new in zip(sequences, before, after):
        same = np.array_equal(old.log_likelihoods, new.log_likelihoods)
        assert same == (spain not in ids)


def test_cases_are_pairs_as_asked_for(run, cases):
    tokenizer = run.tokenizer
    table = {fact.country: fact for fact in facts.read_facts()}
    assert cases == fact_cases(tokenizer, pairs=12) != fact_cases(tokenizer, pairs=12, seed=1)
    for relation in facts.RELATIONS:
        chosen = [case for case in cases if case.relation == relation]
        assert len({case.swap for case in chosen}) == len(chosen) == 12
        for case in chosen:
            assert case.old == getattr(table[case.subject], relation) != case.new
            assert case.new == getattr(table[case.donor], relation)
            assert len(word_ids(tokenizer, case.subject)) == 1
            assert len(case.paraphrases) == 2 and len(case.specificity) == 4
            told = "".join(facts.read_fact_documents())
            assert case.prompt in told
            assert not any(prompt in told for prompt in case.paraphrases)
            for probe in case.locality:
                first, second = probe.prompt.split(". ")
                assert case.subject in first and case.old in first
                assert case.subject not in second and case.donor not in second
    for strategy, names, fits in (
        ("subset", "differing", int.__lt__),
        ("copy", "differing", int.__gt__),
        ("average", "differing", int.__ne__),
        ("average", "more", int.__gt__),
        ("average", "fewer", int.__lt__),
    ):
        for case in fact_cases(tokenizer, pairs=4, tokens=names, strategy=strategy):
            counts = [len(word_ids(tokenizer, x)) for x in (case.subject, case.donor)]
            assert fits(*counts)
    for options, message in (
        ({"pairs": 0}, "--pairs=0 must be at least 1"),
        ({"tokens": "two"}, "--tokens=two must be one of one, more, fewer, differing"),
    ):
        with pytest.raises(InputError, match=message):
            fact_cases(tokenizer, **options)


def test_names_of_other_token_counts_and_refusals(run):
    cases = fact_cases(run.tokenizer, pairs=4, tokens="differing", strategy="subset")
    found = measure_edits(run, cases, strategy="subset", layers=(0,), progress=False)
    assert len(found) == len(cases)
    for options, message in (
        ({"written": "embedding"}, "have different numbers of tokens.*--tokens=one"),
        ({"strategy": "copy"}, "copy needs a target with fewer tokens"),
        ({"layers": (5,)}, "--layers=5: the layers with tables are 0,1"),
        ({"layers": (0, 0)}, "--layers=0,0: .*each once"),
        ({"written": "embedding", "layers": (0,)}, "--write=embedding writes no rows"),
        ({"written": "head"}, "--write=head must be one of rows, embedding"),
    ):
        with pytest.raises(InputError, match=message):
            measure_edits(run, cases, **{"strategy": "average", **options}, progress=False)
    with pytest.raises(InputError, match="there are no edits to measure"):
        measure_edits(run, [])


def test_shares_are_counted_by_relation():
    case = edit_cases.EditCase("capital", "A", "B", "A is", "x", "y")
    first = EditOutcome(case, True, "new", True, (True, False), (True,), ())
    second = EditOutcome(case, True, "old", False, (False, False), (), ())
    other = dataclasses.replace(case, relation="domain")
    third = EditOutcome(other, False, "other", True, (), (False,), ())
    assert summarize([first, second, third]) == [
        ["capital", 2, 100, 50, 50, 0, 50, 25, 100, None, 0],
        ["domain", 1, 0, 0, 0, 100, 100, None, 0, None, 0],
        ["all", 3, 66.67, 33.33, 33.33, 33.33, 66.67, 25, 50, None, 0],
    ]
    # An edit that no prompt reads has not failed.
    unread = EditOutcome(case, True, NOT_READ, None, (True,), (), ())
    assert summarize([first, unread]) == [["capital", 2, 100, 100, 0, 0, 100, 66.67, 100, None, 1]]
    nothing = dataclasses.replace(unread, paraphrases=())
    assert summarize([nothing]) == [["capital", 1, *[None] * 8, 1]]
    assert "  -  " in format_summary(summarize([nothing]))
    [line] = csv.DictReader(io.StringIO(format_csv([unread])))
    assert (line["answer"], line["preferred"]) == ("not read", "")


@pytest.mark.parametrize("written", ["rows", "embedding"])
def test_edits_that_no_prompt_reads_are_told_apart(run, cases, written):
    plain = next(case for case in cases if case.prompt.startswith("The "))
    name = plain.subject
    away = {
        "start": (f"{name} has the capital", NOT_READ),
        "quotes": (f'The capital of "{name}" is', NOT_READ),
        "capitals": (f"The capital of {name.upper()} is", NOT_READ),
        "absent": ("The capital of the country is", NOT_READ),
        "plain": (plain.prompt, None),
    }
    probe = edit_cases.Probe(plain.prompt, plain.old)
    edited = [
        dataclasses.replace(
            plain,
            prompt=prompt,
            paraphrases=(prompt, plain.prompt),
            locality=(edit_cases.Probe(prompt, plain.old), probe),
            specificity=(),
        )
        for prompt, _ in away.values()
    ]
    found = measure_edits(run, edited, written=written, progress=False)
    for outcome, (_, expected) in zip(found, away.values(), strict=True):
        assert (outcome.answer == NOT_READ) == (expected == NOT_READ) == (outcome.preferred is None)
        assert len(outcome.paraphrases) == (1 if expected else 2)
        assert len(outcome.locality) == (1 if expected else 2)
    trial = TrialResult(Trial(), 1, "", found, None, 0)
    assert trial.note.startswith("4 of 5 edits are not in the shares: their prompt reads no edited")
    assert trial.record()["rows"][-1][-1] == 4


@pytest.mark.long
def test_pieces_of_many_edits_give_the_same(run, cases, outcomes, monkeypatch):
    some = cases[:20]
    monkeypatch.setattr(edit_measurement, "_LAID_BYTES", 7 * 4 * 4 * run.config.model.ffn_dim)
    assert [slice(0, 7), slice(7, 14), slice(14, 20)] == list(
        edit_measurement._parts([[None]] * 20, 7)
    )
    assert measure_edits(run, some, progress=False) == outcomes[:20]


def test_fluency_reads_the_edited_rows(run, cases):
    found = fluency(run, cases[:4], max_new_tokens=12, edits=4)
    assert found.edits == 4 and found.before > 0 and found.after != found.before
    # A swap by itself changes nothing; sampling has seeds of its own for what is asked again.
    assert fluency(run, cases[:4], max_new_tokens=12, edits=4) == found


def test_each_sequence_reads_rows_of_its_own(run):
    germany, spain = (word_ids(run.tokenizer, x)[0] for x in ("Germany", "Spain"))
    laid = lay_edits(run, [swap_recipes(run.tokenizer, "Spain=>Germany")])
    keys = SequenceKeys(laid.run.rows["stem"], run.config.model.vocab_size, [{}, laid.keys[0]])
    tokens_2x2 = jnp.asarray([[spain, germany], [spain, germany]], jnp.int32)
    rows_SxUxF, inverse_2x2 = keys.serve(tokens_2x2).block(tokens_2x2, jnp.float32)
    own, other = read_rows(run, np.array([spain, germany]))
    for place, expected in zip(((0, 0), (0, 1), (1, 0), (1, 1)), (own, other, other, other)):
        np.testing.assert_array_equal(rows_SxUxF[:, inverse_2x2[place]], expected)


def test_fluency_falls_with_repetition():
    assert ngram_entropy("a b c d e f g h") > ngram_entropy("a b a b a b a b") > 0
    assert ngram_entropy("a a a a a a") == ngram_entropy("a") == ngram_entropy("") == 0
    # Seven different bigrams and six different trigrams.
    expected = (2 / 3 * np.log2(7) + 4 / 3 * np.log2(6)) / 2
    assert ngram_entropy("a b c d e f g h") == pytest.approx(expected)


def test_the_entry_point_prints_and_writes(workdir, tmp_path, capsys, monkeypatch):
    flags = [f"--workdir={workdir}", "--measure=facts", "--pairs=3", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["edit", *flags])
    cli.run(edit.main)
    out = capsys.readouterr().out
    assert "Edits from facts, percent: rows in all layers with tables" in out
    assert "fluency: n-gram entropy" in out and "mean of 15 edits" in out
    [table] = tmp_path.glob("*.json")
    record = json.loads(table.read_text())
    assert record["columns"] == list(COLUMNS) and len(record["rows"]) == 6
    with table.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 15 and {line["answer"] for line in lines} <= {"new", "old", "other"}
    new = [line["answer"] == "new" for line in lines]
    assert record["rows"][-1][3] == pytest.approx(100 * share(new), abs=0.01)
    edit.main([*flags, "--write=embedding", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["written"] == "embedding" and record["fluency"] is None
    assert record == json.loads(
        (tmp_path / "facts_embedding_one_pairs-3_seed-0_average.json").read_text()
    )
    for wrong, message in (
        ([*flags, "--swap=a=>b"], "--swap: not for --measure=facts"),
        ([flags[0], "--measure=x.json", "--pairs=3"], "--pairs: not for --measure=x.json"),
        (
            [flags[0], "--swap=a=>b", "--write=embedding", "--json"],
            "--json, --write: not for --swap",
        ),
        ([flags[0], "--list", "--swap=a=>b"], "--swap: not for --list"),
    ):
        with pytest.raises(SystemExit, match="2"):
            edit.main(wrong)
        assert message in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out=.*file/x.*choose another folder"):
        edit.main([*flags[:3], f"--out={tmp_path / 'file' / 'x'}"])


def counterfact(case, **more):
    """The record of a case in CounterFact's format."""
    rewrite = {
        "prompt": case.prompt.replace(case.subject, "{}"),
        "relation_id": case.relation,
        "subject": case.subject,
        "target_true": {"str": case.old},
        "target_new": {"str": case.new},
    }
    return {
        "requested_rewrite": rewrite,
        "paraphrase_prompts": list(case.paraphrases),
        "neighborhood_prompts": [],
        **more,
    }


def test_files_in_the_format_of_counterfact_give_the_same(run, cases, outcomes, tmp_path):
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([counterfact(case, donor=case.donor) for case in cases]))
    found = try_edits(run, Trial(str(path)), with_fluency=False, progress=False)
    assert found.left_out == 0 and len(found.outcomes) == len(cases)
    for ours, theirs in zip(found.outcomes, outcomes, strict=True):
        # Exact with its full stop is exact without it, which these records do not ask for.
        assert ours.answer == "new" or theirs.answer != "new"
        assert ours.case.prompt == theirs.case.prompt and ours.specificity == ()
    path.write_text(
        json.dumps(
            [
                {
                    "subject": case.subject,
                    "src": case.prompt,
                    "rephrase": case.paraphrases[0],
                    "answers": [case.old],
                    "alt": case.new,
                    "loc": case.locality[0].prompt,
                    "loc_ans": case.locality[0].answer,
                    "donor": case.donor,
                }
                for case in cases
            ]
        )
    )
    found = try_edits(run, Trial(str(path)), with_fluency=False, progress=False)
    assert len(found.outcomes) == len(cases)
    for ours, case in zip(found.outcomes, cases, strict=True):
        [probe] = ours.case.locality
        # Without the sentence before it no edited row would be read.
        assert probe.prompt == f"{case.prompt} {case.old}. {case.locality[0].prompt}"
        assert probe.answer == case.locality[0].answer
        assert ours.case.paraphrases == case.paraphrases[:1]
    assert share(x.answer == "new" for x in found.outcomes) > 0.9


def test_donors_are_found_among_the_records(run, cases, tmp_path):
    chosen = [case for case in cases if case.relation == "capital"]
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([counterfact(case) for case in chosen]))
    found = try_edits(run, Trial(str(path)), with_fluency=False, progress=False)
    capitals = {fact.capital: fact.country for fact in facts.read_facts()}
    subjects = {case.subject for case in chosen}
    with_donor = [case for case in chosen if capitals[case.new] in subjects]
    assert len(found.outcomes) == len(with_donor) < len(chosen) == 12
    assert found.left_out == 12 - len(with_donor)
    assert f"records without a donor, left out: {found.left_out}" in found.format()
    for outcome in found.outcomes:
        assert outcome.case.donor == capitals[outcome.case.new]
