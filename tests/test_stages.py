"""The stages of a shipped model: each goes on from the one before, and is planned."""

from pathlib import Path

import numpy as np
import pytest

from stem_jax.config_file import load_config
from stem_jax.planning.plan_text import as_text
from stem_jax.planning.table_plan import plan_tables
from stem_jax.planning.topology import Topology
from stem_jax.training.resume import check_continuable
from stem_jax.training.schedule import learning_rates

ROOT = Path(__file__).parent.parent


def test_published_stages_follow_each_other():
    """Tokens, mixture and length are those of arXiv 2601.10639."""
    names = ("stem_1b", "stem_1b_midtrain", "stem_1b_context")
    first, middle, last = (load_config(ROOT / "configs" / f"{name}.py") for name in names)
    assert middle.train.continue_from == "runs/stem_1b"
    assert last.train.continue_from == "runs/stem_1b_midtrain"
    stages = ((first, middle, 100e9), (middle, last, 20e9))
    for before, after, tokens in stages:
        # Their optimizer state means the same.
        check_continuable(Path("runs"), before.train.steps, before, after)
        steps = after.train.steps - before.train.steps
        assert abs(steps * after.tokens_per_step - tokens) <= after.tokens_per_step / 2
        assert after.tokens_per_step == before.tokens_per_step
        rates = learning_rates(after, after.train.steps)[before.train.steps :]
        assert (np.diff(rates) < 0).all() and rates[0] < after.optimizer.learning_rate / 5
    weights = dict(source.split("=") for source in middle.data.sources.split(","))
    assert {name.partition("/")[2]: float(weight) for name, weight in weights.items()} == {
        "olmo_mix_1124": 0.65,
        "nemotron_cc_math": 0.05,
        "nemotron_code": 0.30,
    }
    assert (last.data.sources, last.train.seq_len) == ("stores/prolong_64k", 32768)
    assert last.model.rope_factor * last.model.rope_original_len == last.train.seq_len


@pytest.mark.parametrize("name", ["stem_1b_midtrain", "stem_1b_context"])
def test_stages_are_planned(name):
    """Rows and their moments on a chip of 64: 12 bytes of each of 5,253 M numbers, 939 MiB."""
    config = load_config(ROOT / "configs" / f"{name}.py")
    plan = plan_tables(config, Topology.parse("v5e:8x8", 1))
    assert plan.fits and "128,256 on devices: 0.92 GiB of 15.75 GiB HBM of each" in as_text(plan)
