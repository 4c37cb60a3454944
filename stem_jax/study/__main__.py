"""Trains a study's runs, measures them, and writes what they bear: study.json, a page and a table.

python -m stem_jax.study --config=configs/study/core.py --workdir=runs/study --dry-run
python -m stem_jax.study --config=configs/study/core.py --workdir=runs/study --workers=2
python -m stem_jax.study --config=configs/study/core.py --workdir=runs/study --variant=my.py

A finished run is a record; records that are there are taken. The same command continues.
"""

import sys

from stem_jax import cli
from stem_jax.jax_start import start_jax
from stem_jax.study.flags import parse, records_folder


def main(argv: list[str]) -> None:
    """Parses flags, trains what is missing and writes the results."""
    args = parse(argv, __doc__)
    start_jax()
    from stem_jax.study.campaign import Campaign, Places, locked
    from stem_jax.study.forecast import forecast
    from stem_jax.study.report import read_claims, write_report
    from stem_jax.study.study import load_study, phases_named
    from stem_jax.study.workers import Stopped, Workers

    study = load_study(args.config, args.variant)
    claims = read_claims(study)
    records = records_folder(args.records, args.workdir, study.name)
    phases = phases_named(study, args.phases)
    places = Places(args.workdir, records, args.texts)
    campaign = Campaign(study, phases, places, args.mixed_code, _say)
    if args.dry_run:
        campaign.read()
        print(forecast(campaign, args.workers))
        return
    with locked(args.workdir, "--workdir"), locked(records, "--records"):
        campaign.read()
        if not args.no_training and campaign.missing():
            _say(forecast(campaign, args.workers))
            workers = Workers(args.workers, args.threads, args.workdir / "logs")
            try:
                campaign.train(workers, args.minutes or study.minutes)
            except Stopped:
                _say("stopped; the same command continues")
        print(write_report(campaign, claims, with_cost=not args.no_cost))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
