"""What a training ends with: a completion by the model that it made."""

from pathlib import Path

import jax

from stem_jax.checkpoints.loading import load_run
from stem_jax.config import Config
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.local_copy import address_of


def show_sample(config: Config, workdir: Path) -> str | None:
    """Completes `train.sample_prompt` with the newest checkpoint, prints and returns it.

    Of several devices it only says how to, and returns None.
    """
    prompt = config.train.sample_prompt
    if jax.device_count() > 1:
        where = address_of(workdir)
        print(f'sample: python -m stem_jax.generate --workdir={where} --prompt="{prompt}"')
        return None
    run = load_run(workdir)
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.95)
    [sample] = generator.complete([prompt], config.train.sample_tokens, sampling, config.train.seed)
    text = f"{sample.prompt}{sample.text}"
    print(f"sample:\n{text}")
    return text
