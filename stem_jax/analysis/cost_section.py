"""Cost in words, pictures and tables."""

from stem_jax.analysis import plots
from stem_jax.analysis.analysis import Analysis
from stem_jax.analysis.flop_check import checked_config
from stem_jax.analysis.page import Beside, Block, Picture, Section, Table
from stem_jax.analysis.readable import count
from stem_jax.memory.memory import STEM

_WITHIN = 0.02


def cost_section(found: Analysis) -> Section:
    """FLOPs and bytes of a token by STEM layers, and the check against the compiler."""
    *patterns, own = found.costs
    dense = patterns[0]
    saved = {
        key: 1 - own[key] / dense[key]
        for key in ("training_flops", "prefill_flops", "decode_flops", "read_bytes")
    }
    config = found.own.run.config
    others = [name for name in found.own.run.rows if name != STEM]
    dense_name = "the same without STEM layers" if others else "the dense model"
    if config.model.stem_layers:
        lead = (
            f"Against {dense_name} this one saves {saved['training_flops']:.1%} of the FLOPs of "
            f"a trained token, {saved['prefill_flops']:.1%} of a prompt's, "
            f"{saved['decode_flops']:.1%} of a decoded token's and {saved['read_bytes']:.1%} of "
            "the bytes that decoding reads. "
        )
    else:
        lead = f"A trained token costs {count(own['training_flops'])} matmul FLOPs. "
    blocks: list[Block] = [
        Beside(
            Picture(
                "cost",
                plots.cost_by_stem_layers(patterns),
                "Each STEM layer drops a third of its feed-forward matmuls, and with them the "
                "reading of their weights." + (f" All have {' and '.join(others)}." * bool(others)),
            ),
            _parameters(found),
        ),
        _costs(found),
        _checks(found),
    ]
    return Section("Cost", lead + _verdict(found), blocks)


def _costs(found: Analysis) -> Table:
    columns = ["STEM layers", "training", "prefill", "decode", "parameters read", "bytes read"]
    rows = []
    for record in found.costs:
        keys = ("training_flops", "prefill_flops", "decode_flops", "read_parameters")
        figures = [*(count(record[key]) for key in keys), count(record["read_bytes"]) + "B"]
        rows.append([_name(record), *figures])
    context, cache = found.own.run.config.train.seq_len, found.costs[-1]["cache_bytes"]
    note = (
        f"Matmul FLOPs a token, at a context of {context:,}; attention over all of it, as in PaLM "
        "(arXiv 2204.02311, appendix B). Prefill: of a prompt that fills it, the head for its last "
        "token alone. Read: by one decoded token, its sequence alone, rows and "
        f"{count(cache)}B of keys and values among the bytes. Lookups are no FLOPs."
    )
    return Table(columns, rows, title="FLOPs and reads of a token", note=note)


def _parameters(found: Analysis) -> Table:
    rows = [
        [_name(record), *(count(record[key]) for key in ("active", "table"))]
        for record in found.costs
    ]
    note = "Every token uses the active ones, and of each table the rows of its keys."
    return Table(["STEM layers", "active", "tables"], rows, title="Parameters", note=note)


def _name(record: dict) -> str:
    name = "this model" if record["pattern"] == "own" else record["pattern"].replace("_", " ")
    return f"{name} ({len(record['stem_layers'])})"


def _verdict(found: Analysis) -> str:
    ratios = [check.ratio for check in found.checks if check.program != "training"]
    worst = max(abs(ratio - 1) for ratio in ratios)
    word = "within" if worst <= _WITHIN else "not within"
    return (
        f"FLOPs by formula are {word} {_WITHIN:.0%} of what the compiler counts for prefill and "
        f"decode, dense and STEM (largest difference {worst:.2%})."
    )


def _checks(found: Analysis) -> Table:
    layers = checked_config(found.own.run.config).model.num_layers
    rows = [
        [
            f"{check.program}, {'STEM' if check.stem_layers else 'dense'}",
            count(check.matmul),
            count(check.elementwise) if check.elementwise else "-",
            count(check.sampling + check.keys) if check.sampling else "-",
            count(check.compiled),
            f"{check.matmul_ratio:.4f}",
            f"{check.ratio:.4f}" if check.program != "training" else "-",
        ]
        for check in found.checks
    ]
    columns = ["program", "matmuls", "elementwise", "sampler, keys", "compiled"]
    columns += ["matmuls / compiled", "formula / compiled"]
    note = (
        f"Compiled for one device with {layers} layers at the model's widths, in float32, where no "
        "conversions are counted: a prompt that fills the context, a token after it, a training "
        "step of 8 sequences. Formula: matmuls and elementwise work from shapes (norms, rotary "
        "positions, softmax, gate, residuals), and the sampler and keys of n-grams as they are "
        "counted when compiled alone. The training step has no formula for its elementwise work, "
        "the optimizers' among it; what its matmuls leave is that."
    )
    return Table(columns, rows, title="FLOPs by formula and by the compiler", note=note)
