"""Edits to measure from files in the formats of CounterFact and zsRE.

CounterFact: Meng et al., Locating and Editing Factual Associations in GPT (arXiv 2202.05262),
appendix D. zsRE for editing: Mitchell et al., Fast Model Editing at Scale (arXiv 2110.11309),
section 5. Their records give the answer that is wanted but no subject of which it is true, whose
rows could be taken: the donor is another subject of the file with that answer to the same relation,
or what a field `donor` of the record says. Records of zsRE name no relation, so they need `donor`,
or a field `relation`.

Questions about other subjects follow a sentence about the edited one; alone they would not read an
edited row, and stay as they are whatever the edit.
"""

import dataclasses
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError
from stem_jax.files import read_json
from stem_jax.knowledge.edit_cases import EditCase, Probe

# In tables, of edits whose relation is not named.
_ANY = "any"


@dataclasses.dataclass(frozen=True)
class EditDataset:
    """cases: edits with a donor. without_donor: records that were left out for want of one."""

    cases: list[EditCase]
    without_donor: int


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
        if case.relation:
            donors.setdefault((case.relation, case.old), []).append(case.subject)
    found = []
    for case in cases:
        others = [x for x in donors.get((case.relation, case.new), []) if x != case.subject]
        if case.donor or others:
            relation, donor = case.relation or _ANY, case.donor or others[0]
            found.append(dataclasses.replace(case, relation=relation, donor=donor))
    if not found:
        raise InputError(
            f"--measure={path}: none of its {len(cases)} records has a donor, a subject of the "
            "same relation of which the new answer is true; name one in a field `donor`"
        )
    return EditDataset(found, len(cases) - len(found))


def _counterfact(record: dict[str, Any]) -> EditCase:
    wanted = record["requested_rewrite"]
    subject, old = _text(wanted["subject"]), _text(wanted["target_true"]["str"])
    prompt = _text(wanted["prompt"]).replace("{}", subject)
    return EditCase(
        relation=str(wanted.get("relation_id", "")),
        subject=subject,
        donor=_text(record.get("donor", "")),
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
    locality = ()
    if "loc" in record:
        question = f"{prompt} {old}. {_text(record['loc'])}"
        locality = (Probe(question, _text(record["loc_ans"])),)
    return EditCase(
        relation=str(record.get("relation", "")),
        subject=_text(record["subject"]),
        donor=_text(record.get("donor", "")),
        prompt=prompt,
        old=old,
        new=_text(record["alt"]),
        paraphrases=_texts([record["rephrase"]] if "rephrase" in record else []),
        locality=locality,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value.strip()


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(map(_text, values))
