"""The sections of an analysis: what was found in words, with pictures and tables of the figures."""

import itertools
import math

from stem_jax.analysis import plots
from stem_jax.analysis.analysis import Analysis
from stem_jax.analysis.cost_section import cost_section
from stem_jax.analysis.geometry_section import geometry_section
from stem_jax.analysis.page import Beside, Block, Picture, Section, Table
from stem_jax.analysis.readable import count, plural
from stem_jax.analysis.stability import LAST, NormSummary, Stability
from stem_jax.config import Config
from stem_jax.memory.catalogue import memories as memories_of
from stem_jax.memory.memory import STEM, Memory

FOOT = (
    "Made by python -m stem_jax.analyze. Every figure of this page stands in analysis.json beside "
    "it; the pictures are files there, too."
)


def header(found: Analysis) -> tuple[str, str, list[tuple[str, str]]]:
    """Title, subtitle and facts of the page."""
    own, model = found.own, found.own.run.config.model
    train, parameters = own.run.config.train, own.parameters
    memories = {name: of for name, of in memories_of(own.run.config).items() if name != STEM}
    layers = ", ".join(map(str, model.stem_layers)) or "none"
    layers += "" if model.stem_layers or memories else ": a dense model"
    shape = f"{model.num_layers} layers, D {model.embed_dim}, F {model.ffn_dim}"
    heads = f"{model.num_heads} heads, {model.num_kv_heads} for keys and values"
    facts = [
        ("checkpoint", f"step {own.run.step:,} of {train.steps:,}"),
        ("model", f"{shape}, {heads}"),
        ("STEM layers", layers),
        *((f"{name} layers", _layers_of(own.run.config, of)) for name, of in memories.items()),
        ("vocabulary", f"{model.vocab_size:,} tokens ({own.run.tokenizer.kind})"),
        ("active parameters", count(parameters.active)),
        ("table parameters", count(parameters.table)),
        ("context", f"{train.seq_len:,} tokens"),
        ("trained on", own.run.config.data.sources),
    ]
    if found.dense is not None:
        twin = found.dense
        size = count(twin.parameters.total)
        facts.append(("dense twin", f"{twin.workdir}, step {twin.run.step:,}, {size} parameters"))
    return f"Inside {own.workdir}", f"Looked at with the text {found.text}", facts


def _layers_of(config: Config, memory: Memory) -> str:
    reading = [layer for layer in range(config.model.num_layers) if memory.reads(layer)]
    return ", ".join(map(str, reading)) or "before the first"


def sections_of(found: Analysis) -> list[Section]:
    """All sections that there is something to say in."""
    made = [_capacity(found), cost_section(found), _training(found)]
    # Of a model with other memories than STEM's there is neither.
    if found.rows or found.means:
        made.insert(0, geometry_section(found))
    if found.edits:
        made.append(_editing(found))
    made.append(_compared(found))
    return made


def _capacity(found: Analysis) -> Section:
    title, capacity = "Capacity", found.capacity
    if capacity is None:
        active = count(found.own.parameters.active)
        lead = f"This model has no tables: every context touches the same {active} parameters."
        if found.own.run.rows:
            lead = f"This model has no rows of STEM's, but of {', '.join(found.own.run.rows)}."
        return Section(title, lead, [])
    at = min(capacity.lengths, key=lambda c: abs(math.log(c.length / capacity.context)))
    first = capacity.overtakes()
    lead = (
        f"A context of {at.length:,} tokens touches {count(at.parameters)} parameters of STEM's "
        f"tables, {at.parameters / capacity.table:.1%} of all of these. A dense model has "
        f"{count(capacity.replaced)} in the up projections of these layers, whatever the context; "
    )
    lead += (
        f"rows pass that at {first:,} tokens." if first else "rows stay below that in this text."
    )
    growth = math.log2(capacity.lengths[-1].parameters / capacity.lengths[0].parameters) / max(
        len(capacity.lengths) - 1, 1
    )
    caption = (
        "The longer the context, the more rows it brings into play: per doubling "
        f"{2**growth:.2f} times as many on average, while a dense model always has the same."
    )
    rows = [
        [
            f"{c.length:,}",
            f"{c.windows}",
            f"{c.distinct:,.1f}",
            count(c.parameters),
            count(c.low),
            count(c.high),
        ]
        for c in capacity.lengths
    ]
    columns = ["tokens", "windows", "distinct", "parameters", "fewest", "most"]
    note = (
        "Distinct tokens times S F: mean, fewest and most over evenly spaced windows of the text, "
        "in which documents follow each other as in training. Nothing longer than the context was "
        "trained on."
    )
    picture = Picture("capacity", plots.context_capacity(capacity), caption)
    return Section(title, lead, [Beside(picture, Table(columns, rows, note=note))])


def _training(found: Analysis) -> Section:
    title = "Training"
    named = [("this run", plots.ROWS, found.own.stability)]
    if found.dense is not None:
        named.append(("dense twin", plots.DENSE, found.dense.stability))
    runs = [(name, color, stability) for name, color, stability in named if stability is not None]
    if not runs:
        lead = "No metrics.jsonl with training steps was found: an imported model has none."
        return Section(title, lead, [])
    lead = " ".join(_trained(name, stability) for name, _, stability in runs)
    columns = ["", *(name for name, _, _ in runs)]
    losses = Picture(
        "loss",
        plots.loss_curves(runs),
        "Loss of each logged step (faint), its running median (bold)"
        + (
            ", and the loss on held-out documents; "
            if any(s.held_out for _, _, s in runs)
            else "; "
        )
        + (
            "a cross marks a spike." if any(s.spikes for _, _, s in runs) else "no step is a spike."
        ),
    )
    series = [
        (f"{name}, backbone", color, s.steps, s.backbone_norms)
        for name, color, s in runs
        if s.backbone
    ] + [
        (f"{name}, {part}", color, s.steps, norms)
        for name, _, s in runs
        for color, (part, norms) in zip(
            itertools.cycle(plots.MEMORIES), [("tables", s.table_norms), *s.memory_norms.items()]
        )
        if norms
    ]
    norms = Picture(
        "gradient_norms",
        plots.gradient_norms(series),
        "Gradient norms of each logged step (faint) and their running median (bold); the backbone "
        "and each memory are cut to their norms apart.",
    )
    note = (
        "A spike is a loss above the median of the last 100 logged steps by more than six times "
        "their median absolute deviation (scaled by 1.4826 to a standard deviation), once there "
        "are 20; a loss that is not finite is one, too."
    )
    clipped = "Norms before clipping; clipped: steps whose norm was above the one they are cut to."
    return Section(
        title,
        lead,
        [
            Beside(losses, Table(columns, _loss_rows([s for _, _, s in runs]), note=note)),
            Beside(norms, _norm_table(runs, clipped)),
        ],
    )


def _trained(name: str, found: Stability) -> str:
    skipped = plural(found.skipped, "skipped step")
    return (
        f"{name.capitalize()}: {plural(len(found.spikes), 'loss spike')} and {skipped} in "
        f"{len(found.steps):,} logged steps, mean loss of the last {LAST} steps "
        f"{found.last_loss:.3f} nats per token."
    )


def _loss_rows(runs: list[Stability]) -> list[list[str]]:
    def held_out(run: Stability, pick) -> str:
        return f"{pick(loss for _, loss in run.held_out):.4f}" if run.held_out else "-"

    lines = [
        ("logged steps", lambda s: f"{len(s.steps):,}"),
        ("loss spikes", lambda s: str(len(s.spikes))),
        ("at steps", lambda s: ", ".join(map(str, s.spikes[:8])) or "-"),
        ("skipped steps", lambda s: str(s.skipped)),
        (f"mean loss of the last {LAST} steps", lambda s: f"{s.last_loss:.4f}"),
        ("held-out loss, last", lambda s: held_out(s, lambda losses: list(losses)[-1])),
        ("held-out loss, best", lambda s: held_out(s, min)),
    ]
    return [[label, *(cell(run) for run in runs)] for label, cell in lines]


def _norm_table(runs: list[tuple[str, str, Stability]], note: str) -> Table:
    def row(name: str, norms: NormSummary) -> list[str]:
        figures = (norms.median, norms.p95, norms.largest)
        return [name, *(f"{x:.3g}" for x in figures), f"{norms.clipped:.1%}"]

    rows = []
    for name, _, found in runs:
        parts = {"backbone": found.backbone, "tables": found.tables, **found.memories}
        rows += [row(f"{name}, {part}", norms) for part, norms in parts.items() if norms]
    return Table(["", "median", "95th percentile", "largest", "clipped"], rows, note=note)


def _editing(found: Analysis) -> Section:
    blocks: list[Block] = [
        Table(
            t.columns,
            [["-" if cell is None else _cell(cell) for cell in row] for row in t.rows],
            title=t.title,
            note=t.note,
            text=True,
        )
        for t in found.edits
    ]
    lead = (
        "Each edit is made alone, then asked about. New, old, other: shares of the edits after "
        "which the wanted answer is given, the one from before, another. Preferred: the new is "
        "likelier than the old. Paraphrase: the new in other words. Locality, specificity: "
        "answers about other subjects, and about other relations of the edited one, that stay."
    )
    return Section("Editing", lead, blocks)


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _compared(found: Analysis) -> Section:
    sample = found.sample
    lead = (
        f"Frequencies are counted over {sample.tokens:,} tokens of {found.text}, which has "
        f"{sample.distinct:,} distinct ones"
    )
    if found.rows or found.means:
        lead += f"; vectors are those of {sample.seen:,} of these"
        lead += f"{'' if sample.seen < sample.distinct else ' (all)'}, drawn with equal chances"
    lead += "."
    unseen = len(sample.ids) - sample.seen
    if found.rows and unseen:
        lead += f" Norms are shown of the rows of {unseen:,} tokens that it lacks, too."
    if found.dense is None:
        return Section("What was looked at", lead, [])
    if not found.differences:
        same = "Run and twin differ in their STEM layers alone."
        return Section("What was looked at", lead, [same])
    rows = [[key, str(mine), str(theirs)] for key, mine, theirs in found.differences]
    columns = ["key", "this run", "dense twin"]
    title = "Beside their STEM layers, run and twin differ in"
    return Section("What was looked at", lead, [Table(columns, rows, title=title, text=True)])
