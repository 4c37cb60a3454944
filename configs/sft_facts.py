"""The facts model, tuned to answer questions: it learns to answer, and to stop.

python -m benchmarks.fact_questions --write=runs/fact_questions
python -m stem_jax.prepare --format=chat --input=runs/fact_questions/half.jsonl \
    --chat-template=runs/fact_questions/chat.jinja --tokenizer=sentencepiece \
    --tokenizer-path=runs/facts/tokenizer/tokenizer.model --validation-fraction=0 \
    --out=runs/fact_questions/store
python -m stem_jax.train --config=configs/sft_facts.py
python -m benchmarks.fact_questions --measure=runs/sft_facts

It begins with runs/facts, which configs/facts.py trains.
"""

from configs.facts import get_config as facts_config


def get_config():
    """200 steps on conversations about half of the countries, whole ones in a row."""
    config = facts_config()
    config.data.sources = "runs/fact_questions/store"
    config.data.packing = "whole"
    config.train.init_from = "runs/facts"
    config.train.steps = 200
    config.train.global_batch_size = 32
    config.train.sample_prompt = ""
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 10
    config.checkpoint.every = 200
    return config
