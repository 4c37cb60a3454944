"""What a study leaves for people and programs."""

import json
from pathlib import Path
from typing import Any

from stem_jax.config_program import found_program, run_program
from stem_jax.files import read_json, write_whole
from stem_jax.study.campaign import Campaign
from stem_jax.study.claims import Claim, check_claims
from stem_jax.study.cost import compared, cost_of_variants
from stem_jax.study.csv_file import write_csv
from stem_jax.study.markdown import markdown_of, picture_files
from stem_jax.study.page import write_page
from stem_jax.study.results import results_of, results_text
from stem_jax.study.study import Study
from stem_jax.study.text_notes import noted_overlaps


def read_claims(study: Study) -> tuple[Claim, ...]:
    """The claims of a study's file, checked against its variants and texts; () without a file.

    Raises:
        InputError: claims that the study could not answer.
    """
    if study.claims is None:
        return ()
    path = found_program(Path(study.claims), "claims", "", "study")
    claims = run_program(path, "claims", lambda module: tuple(module.CLAIMS))
    check_claims(claims, study.variants, study.texts, str(path))
    return claims


def write_report(campaign: Campaign, claims: tuple[Claim, ...], with_cost: bool) -> str:
    """Writes study.json, its page, tables and pictures and, if it is not there, cost.json.

    Returns a few lines for people.
    """
    workdir, study = campaign.places.workdir, campaign.study
    records = list(campaign.records.values())
    main = next((phase.text for phase in study.phases if phase.purpose == "main"), None)
    overlaps = None if main is None else noted_overlaps(campaign.places.records, main)
    asked = [run.name for run in campaign.asked()]
    says = {variant.name: variant.says for variant in study.variants.values()}
    results = results_of(records, claims, study.name, overlaps=overlaps, asked=asked, variants=says)
    cost = _cost(campaign, with_cost)
    write_whole(workdir / "study.json", results_text(results))
    write_csv(records, workdir / "study.csv")
    write_page(results, cost, workdir / "study.html")
    write_whole(workdir / "study.md", markdown_of(results))
    for name, figure in picture_files(results).items():
        write_whole(workdir / "pictures" / name, figure)
    lines = [f"{claim['verdict']:<11} {claim['says']}" for claim in results["claims"]]
    missing = len(campaign.missing())
    if missing:
        lines.append(f"{missing} of {len(asked)} runs are missing; the same command trains them")
    return "\n".join([*lines, f"{workdir / 'study.html'}"])


def _cost(campaign: Campaign, wanted: bool) -> dict[str, Any] | None:
    path = campaign.places.workdir / "cost.json"
    if path.exists():
        there = read_json(path)
        # A variant may have come since.
        if set(there["variants"]) >= set(compared(campaign.study)):
            return there
    if not wanted or campaign.missing():
        return None
    cost = cost_of_variants(campaign.study, campaign.places.texts)
    write_whole(path, json.dumps(cost, indent=1, sort_keys=True) + "\n")
    return cost
