"""The model card of an export: README.md with the fields that hubs read."""

import re

from stem_jax.config import Config
from stem_jax.errors import InputError

NAME = "README.md"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def check_licence(licence: str | None) -> None:
    """Raises InputError for what is no identifier of a licence."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise InputError(
            f"--license={licence} is no identifier; give one of the hub's, such as apache-2.0, in "
            "small letters, or other"
        )


def model_card(config: Config, step: int, licence: str | None) -> str:
    """Its text.

    Args:
        config: of the model.
        step: of the checkpoint.
        licence: identifier that the hub knows, such as apache-2.0; None: none is said, and that is.
    """
    model, tables = config.model, config.model.stem_layers
    fields = ["library_name: transformers", "pipeline_tag: text-generation"]
    if licence is not None:
        fields.append(f"license: {licence}")
    if tables:
        fields.append("tags: [stem, custom_code]")
    trust = ", trust_remote_code=True" if tables else ""
    code = (
        f"{len(tables)} of its {model.num_layers} layers read a row of a table by token id "
        f"(`stem_site` {model.stem_site}); the code for that lies in this folder."
        if tables
        else "It is a plain Llama."
    )
    said = (
        "No licence was said at the export: ask who published it before you use it."
        if licence is None
        else f"Licence: {licence}, as said at the export."
    )
    return "\n".join(
        [
            "---",
            *fields,
            "---",
            "",
            "# Model card",
            "",
            f"A language model trained with stem_jax, at step {step}. {code}",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_NAME"{trust})',
            f'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_NAME"{trust})',
            "```",
            "",
            "| vocabulary | width | layers | heads | context |",
            "|---|---|---|---|---|",
            f"| {model.vocab_size} | {model.embed_dim} | {model.num_layers} | {model.num_heads} | "
            f"{config.train.seq_len} |",
            "",
            f"{said} What it was trained on is not recorded here.",
            "",
        ]
    )
