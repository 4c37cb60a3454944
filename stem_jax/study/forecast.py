"""What a study will take, before it is begun."""

from stem_jax.study.campaign import Campaign, cost_of
from stem_jax.study.runs import chosen_rates, runs_of

# Seconds of a run that are no training: starting, compiling, validating, measuring.
_AROUND = 60


def forecast(campaign: Campaign, workers: int) -> str:
    """A table of phases: runs, those that have records, training FLOPs and hours of the others.

    Args:
        workers: that train side by side.
    """
    study = campaign.study
    chosen = chosen_rates(list(campaign.records.values()))
    heads = (
        f"{'phase':<11} {'runs':>5} {'done':>5} {'to train':>8}  {'FLOPs':>8} {'hours':>6}  what"
    )
    lines, seen = [heads], set()
    total_runs = total_done = 0
    total_flops = total_hours = 0.0
    for phase in campaign.phases:
        runs = [run for run in runs_of(study, phase, chosen) if run.name not in seen]
        seen |= {run.name for run in runs}
        missing = [run for run in runs if run.name not in campaign.records]
        costs = cost_of(study, missing)
        flops = sum(cost[1] for cost in costs)
        hours = sum(cost[2] + _AROUND for cost in costs) / 3600 / workers
        lines.append(
            f"{phase.purpose:<11} {len(runs):>5} {len(runs) - len(missing):>5} {len(missing):>8}  "
            f"{flops:>8.2g} {hours:>6.1f}  {phase.says}"
        )
        total_runs, total_done = total_runs + len(runs), total_done + len(runs) - len(missing)
        total_flops, total_hours = total_flops + flops, total_hours + hours
    left = total_runs - total_done
    lines.append(
        f"{'all':<11} {total_runs:>5} {total_done:>5} {left:>8}  {total_flops:>8.2g} "
        f"{total_hours:>6.1f}"
    )
    lines += [
        "",
        f"{study.tokens:,} tokens a run of full length; hours for {workers} worker"
        f"{'s' * (workers > 1)}, from {study.tokens_per_second:,.0f} tokens a second of "
        f"{study.baseline!r} and FLOPs by formula; your machine may differ.",
        "Runs that several phases ask for are counted once; rates that are not chosen yet count "
        "as 1.",
    ]
    return "\n".join(lines)
