"""Edits to measure from files in the formats of CounterFact and zsRE.

CounterFact: Meng et al., Locating and Editing Factual Associations in GPT (arXiv 2202.05262),
appendix D. zsRE for editing: Mitchell et al., Fast Model Editing at Scale (arXiv 2110.11309),
section 5. Their records give the answer that is wanted but no subject of which it is true, whose
rows could be taken: the donor is another subject of the file with that answer to the same relation,
or what a field `donor` of the record says.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError
from stem_jax.knowledge.edit_cases import EditCase, Probe


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
    path = Path(path)
    try:
        records = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--measure={path} cannot be read ({error}); give a JSON file") from error
    if not isinstance(records, list) or not all(isinstance(x, dict) for x in records):
        raise InputError(f"--measure={path} is not a list of records; give CounterFact or zsRE")
    cases = []
    for number, record in enumerate(records):
        read = _counterfact if "requested_rewrite" in record else _zsre
        try:
            cases.append(read(record))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(
                f"--measure={path}: record {number} lacks {error}; records of CounterFact have "
                "requested_rewrite.{prompt,subject,target_true.str,target_new.str}, those of zsRE "
                "subject, src, answers and alt"
            ) from error
    donors: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        donors.setdefault((case.relation, case.old), []).append(case.subject)
    found = []
    for case in cases:
        others = [x for x in donors.get((case.relation, case.new), []) if x != case.subject]
        if case.donor or others:
            found.append(dataclasses.replace(case, donor=case.donor or others[0]))
    if not found:
        raise InputError(
            f"--measure={path}: none of its {len(cases)} records has a donor, a subject of the "
            "same relation of which the new answer is true; name one in a field `donor`"
        )
    return EditDataset(found, len(cases) - len(found))


def _counterfact(record: dict[str, Any]) -> EditCase:
    wanted = record["requested_rewrite"]
    subject, old = wanted["subject"], wanted["target_true"]["str"].strip()
    return EditCase(
        relation=str(wanted.get("relation_id", "all")),
        subject=subject,
        donor=record.get("donor", ""),
        prompt=wanted["prompt"].format(subject),
        old=old,
        new=wanted["target_new"]["str"].strip(),
        paraphrases=tuple(record.get("paraphrase_prompts", ())),
        # About subjects of the same relation, of whom the old answer is true.
        locality=tuple(Probe(text, old) for text in record.get("neighborhood_prompts", ())),
    )


def _zsre(record: dict[str, Any]) -> EditCase:
    locality = ()
    if "loc" in record:
        locality = (Probe(record["loc"].strip(), record["loc_ans"].strip()),)
    return EditCase(
        relation=str(record.get("relation", "all")),
        subject=record["subject"],
        donor=record.get("donor", ""),
        prompt=record["src"].strip(),
        old=record["answers"][0].strip(),
        new=record["alt"].strip(),
        paraphrases=(record["rephrase"].strip(),) if "rephrase" in record else (),
        locality=locality,
    )
