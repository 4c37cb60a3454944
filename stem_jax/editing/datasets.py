"""Edits to measure from files in the formats of CounterFact and zsRE.

CounterFact: Meng et al., Locating and Editing Factual Associations in GPT (arXiv 2202.05262),
appendix D. zsRE for editing: Mitchell et al., Fast Model Editing at Scale (arXiv 2110.11309),
section 5. Their records give the answer that is wanted but no subject of which it is true, whose
rows could be taken: the donor is another subject of the file of which the same is asked, with that
answer, or what a field `donor` of the record says. The same is asked by records of one relation
(`relation_id`, or a field `relation`), and where none is named, as in zsRE, by questions that have
the same words but for the subject. Of a file as it is published most records find no donor.

Questions about other subjects follow a sentence about the edited one; alone they would not read an
edited row, and stay as they are whatever the edit.
"""

import dataclasses
from pathlib import Path
from typing import Any

from stem_jax.data.tokenizer import Tokenizer
from stem_jax.editing.cases import EditCase, Probe
from stem_jax.editing.swaps import swap_recipes
from stem_jax.errors import InputError
from stem_jax.files import read_json

# In tables, of edits whose relation is not named.
_ANY = "any"


@dataclasses.dataclass(frozen=True)
class EditDataset:
    """cases: edits with a donor. without_donor: records that were left out for want of one."""

    cases: list[EditCase]
    without_donor: int

    def swappable(self, tokenizer: Tokenizer, strategy: str) -> list[EditCase]:
        """The cases whose names a strategy of `swaps.swap_recipes` fits.

        Raises:
            InputError: it fits none; the message is about the first.
        """
        found, first = [], None
        for case in self.cases:
            try:
                swap_recipes(tokenizer, case.swap, strategy)
            except InputError as error:
                first = first or error
            else:
                found.append(case)
        if not found:
            raise InputError(
                f"no edit of --measure can be made with --strategy={strategy}; the first: {first}"
            )
        return found


def read_edit_dataset(path: str | Path) -> EditDataset:
    """Reads a JSON list of records, CounterFact's (with `requested_rewrite`) or zsRE's (`src`).

    Raises:
        InputError: no such file, not such a list, a record without a field, or no donor for any.
    """
    records = read_json(path, "--measure=", "give a JSON file", constants=True)
    if not isinstance(records, list) or not all(isinstance(x, dict) for x in records):
        raise InputError(f"--measure={path} is not a list of records; give CounterFact or zsRE")
    cases = []
    for number, record in enumerate(records):
        read = _counterfact if "requested_rewrite" in record else _zsre
        try:
            cases.append(read(record))
        except (LookupError, TypeError, AttributeError) as error:
            lacks = f"lacks {error}" if isinstance(error, LookupError) else f"is wrong: {error}"
            raise InputError(
                f"--measure={path}: record {number} {lacks}; records of CounterFact have "
                "requested_rewrite.{prompt,subject,target_true.str,target_new.str}, those of zsRE "
                "subject, src, answers and alt"
            ) from error
        if cases[-1].old == cases[-1].new:
            raise InputError(
                f"--measure={path}: record {number} wants {cases[-1].new!r}, which is the answer "
                "already; remove it"
            )
    donors: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        donors.setdefault((_asked(case), case.old), []).append(case.subject)
    found = []
    for case in cases:
        others = [x for x in donors.get((_asked(case), case.new), []) if x != case.subject]
        if case.donor or others:
            relation, donor = case.relation or _ANY, case.donor or others[0]
            found.append(dataclasses.replace(case, relation=relation, donor=donor))
    if not found:
        raise InputError(
            f"--measure={path}: none of its {len(cases)} records has a donor, a subject of "
            "another record that asks the same, with the new answer; name one in a field `donor`"
        )
    return EditDataset(found, len(cases) - len(found))


def _asked(case: EditCase) -> str:
    """The same for cases that ask the same of their subjects."""
    if case.relation:
        return f"relation {case.relation}"
    words = case.prompt.replace(case.subject, "{}")
    # Without the subject in it, it asks about nobody else.
    return " ".join(words.casefold().split()) if "{}" in words else f"of {case.subject}: {words}"


def _counterfact(record: dict[str, Any]) -> EditCase:
    wanted = record["requested_rewrite"]
    subject, old = _text(wanted["subject"]), _text(wanted["target_true"]["str"])
    prompt = _text(wanted["prompt"]).replace("{}", subject)
    return EditCase(
        relation=str(wanted.get("relation_id", "")),
        subject=subject,
        donor=_donor(record),
        prompt=prompt,
        old=old,
        new=_text(wanted["target_new"]["str"]),
        paraphrases=_texts(record.get("paraphrase_prompts", [])),
        # About subjects of the same relation, of whom the old answer is true.
        locality=tuple(
            Probe(f"{prompt} {old}. {text}", old)
            for text in _texts(record.get("neighborhood_prompts", []))
        ),
    )


def _zsre(record: dict[str, Any]) -> EditCase:
    prompt, old = _text(record["src"]), _text(record["answers"][0])
    locality: tuple[Probe, ...] = ()
    if "loc" in record:
        question = f"{prompt} {old}. {_text(record['loc'])}"
        locality = (Probe(question, _text(record["loc_ans"])),)
    return EditCase(
        relation=str(record.get("relation", "")),
        subject=_text(record["subject"]),
        donor=_donor(record),
        prompt=prompt,
        old=old,
        new=_text(record["alt"]),
        paraphrases=_texts([record["rephrase"]] if "rephrase" in record else []),
        locality=locality,
    )


def _donor(record: dict[str, Any]) -> str:
    """ "" where the record names none."""
    return _text(record["donor"]) if record.get("donor") else ""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r} is no text")
    return value.strip()


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(map(_text, values))
