"""The code of exports against that which came with an earlier one: the same weights, and logits."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from stem_jax.interop import hf_export

EARLIER = Path(__file__).parents[1] / "data" / "earlier" / "export"
SCALED = {"factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 5e5}
# What its configuration says otherwise; the weights are trained, and two heads share keys.
MODELS = {
    "as trained": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **SCALED,
        }
    },
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, **SCALED}
    },
    "dense layer": {"stem_layers": None},
}


def _folders(name, place):
    """The earlier export with other values, and the same with the code of now."""
    config = json.loads((EARLIER / "config.json").read_text())
    weights = safetensors.torch.load_file(EARLIER / "model.safetensors")
    config |= MODELS[name]
    if name == "tied":
        weights.pop("lm_head.weight", None)
    if name == "dense layer":
        first, *config["stem_layers"] = json.loads((EARLIER / "config.json").read_text())[
            "stem_layers"
        ]
        # The projection that is nearest to the table.
        table = weights.pop(f"model.layers.{first}.mlp.up_table.weight")
        up = torch.linalg.lstsq(weights["model.embed_tokens.weight"], table).solution.T
        weights[f"model.layers.{first}.mlp.up_proj.weight"] = up.contiguous()
    old, new = place / "old", place / "new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(EARLIER / "modeling_stem.py", old)
    (old / "config.json").write_text(json.dumps(config))
    for code in hf_export.CODE_FILES:
        shutil.copy(Path(hf_export.__file__).with_name(code), new)
    classes = hf_export.auto_map(hf_export.CODES[()])
    (new / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    return old, new


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, tmp_path):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for folder in _folders(name, tmp_path / str(dtype).removeprefix("torch.")):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=True, dtype=dtype
            ).eval()
            tokens = torch.randint(3, model.config.vocab_size, (4, 16), generator=_seeded())
            with torch.no_grad():
                found[folder.name, dtype] = model(tokens).logits.float()
    old, new = (found[code, torch.float32] for code in ("old", "new"))
    assert old.abs().max() > 1
    torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    # The norms round once more in between, as Llama's do.
    off = [(found[code, torch.bfloat16] - old).abs().mean() for code in ("old", "new")]
    print(f"\n{name}: in bfloat16 off by {off[0]:.4f} before, {off[1]:.4f} now")
    assert off[1] < 1.5 * off[0]


def _seeded():
    return torch.Generator().manual_seed(0)
