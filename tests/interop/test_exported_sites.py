"""Where a row goes: exports of each `model.stem_site` say what we say, and are read again."""

import json

import numpy as np
import pytest
import torch
import transformers

from stem_jax import export, import_torch
from stem_jax.checkpoints.loading import load_run
from stem_jax.errors import InputError
from tests.saved_models import logits, run_folders

MODELS = {
    "gate": {"model.stem_site": "gate", "model.tie_embeddings": True},
    "up_add": {"model.stem_site": "up_add", "model.num_kv_heads": 2},
}


@pytest.fixture(scope="module")
def run_folder(train_step, make_batch, tmp_path_factory):
    """run_folder(site): the work folder of a trained model."""
    return run_folders(MODELS, train_step, make_batch, tmp_path_factory)


@pytest.mark.long
@pytest.mark.parametrize("site", MODELS)
def test_out_and_back(site, run_folder, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    export.main([f"--workdir={run_folder(site)}", f"--out={out}", "--format=hf"])
    run = load_run(run_folder(site))
    tokens = np.random.default_rng(0).integers(0, 258, (2, 24))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert model.config.stem_site == site
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    ours = logits(run, tokens)
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)
    import_torch.main(["--from=hf", f"--path={out}", f"--workdir={back}"])
    again = load_run(back)
    assert again.config.model.stem_site == site
    assert again.params.keys() == run.params.keys()
    for name, value in run.params.items():
        np.testing.assert_array_equal(np.asarray(again.params[name]), np.asarray(value), name)
    np.testing.assert_allclose(logits(again, tokens), ours, atol=1e-5, rtol=0)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "stem_site": "down"}))
    with pytest.raises(InputError, match="stem_site='down', only up, gate, up_add can be read"):
        import_torch.main(["--from=hf", f"--path={out}", f"--workdir={tmp_path / 'bad'}"])
