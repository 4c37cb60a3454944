"""What a refused resume says: the overrides with which the run goes on."""

import re
import shlex
from pathlib import Path

import pytest

from stem_jax.config_file import load_config
from stem_jax.errors import InputError
from stem_jax.training.resume import check_resumable

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("stem_1b", {"optimizer.learning_rate": "0.001"}),
        (
            "stem_350m_long",
            {
                "model.rope_factor": "4.0",
                "train.global_batch_size": "128",
                "train.seq_len": "8192",
            },
        ),
    ],
)
def test_a_run_of_a_file_as_it_was_shipped_is_told_how_it_goes_on(name, before):
    """The refusal prints the overrides; with them nothing is refused."""
    path = ROOT / "configs" / f"{name}.py"
    saved = load_config(path, before)
    with pytest.raises(InputError) as refused:
        check_resumable(saved, load_config(path), 1000)
    flags = re.findall(r"--config\.(\S+?)=(\S+?)(?=[ ,])", str(refused.value))
    assert dict(flags) == before
    check_resumable(saved, load_config(path, dict(flags)), 1000)


def test_overrides_of_every_type_lead_back():
    """Nothing, a switch, indices and a text with spaces, as a shell reads them."""
    path = ROOT / "configs" / "tiny.py"
    saved = load_config(path)
    changes = {
        "tables.init_std": "0.5",
        "model.tie_embeddings": "true",
        "model.stem_layers": "none",
        "data.sources": "a b",
    }
    other = load_config(path, changes)
    for one, now in ((saved, other), (other, saved)):
        with pytest.raises(InputError) as refused:
            check_resumable(one, now, 0)
        words = shlex.split(re.search(r"add (.*), or start", str(refused.value))[1])
        flags = dict(word.removeprefix("--config.").split("=", 1) for word in words)
        assert flags.keys() == changes.keys()
        assert load_config(path, flags) == one
