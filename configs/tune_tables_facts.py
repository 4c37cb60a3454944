"""Teaches the model of facts.py other answers about 20 countries, in the rows of their names alone.

python -m stem_jax.train --config=configs/facts.py
python -m stem_jax.train --config=configs/tune_tables_facts.py
python -m stem_jax.export --workdir=runs/tune_tables_facts --format=patch --out=facts.patch
python -m stem_jax.generate --workdir=runs/facts --prompt="The capital of Denmark is" \
    --edits=facts.patch

Measured in benchmarks/RESULTS.md.
"""

from configs.facts import get_config as facts_config


def get_config():
    """A minute on two cores; other facts are told beside, for names that share a token with one."""
    config = facts_config()
    config.train.init_from = "runs/facts"
    config.data.sources = "facts_changed=1,facts_unchanged=2"
    config.optimizer.train = "tables"
    config.tables.weight_decay = 0.0
    config.tables.trained_words = (
        "Angola,Barbados,Brunei,Chile,Denmark,Eswatini,Greece,India,Jordan,Liberia,Malta,Morocco,"
        "Nigeria,Paraguay,Saint Kitts and Nevis,Sierra Leone,Sri Lanka,Togo,United Kingdom,Zimbabwe"
    )
    config.train.steps = 200
    config.train.sample_prompt = "The capital of Denmark is"
    config.checkpoint.every = 0
    return config
