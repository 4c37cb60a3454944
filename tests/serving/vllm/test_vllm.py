"""Greedy tokens of vLLM, by the plugin and by its Transformers backend, equal ours.

tests/serving/environment.sh ENV
STEM_VLLM_PYTHON=ENV/bin/python python -m pytest --long -n 0 tests/serving/vllm
"""

import subprocess

import pytest
import torch
import transformers

from tests.serving.vllm.answers import PYTHON, TOKENS, check_equal, greedy, vllm

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(PYTHON is None, reason="tests/serving/environment.sh says how"),
]

OF_ALL = {
    "dtype": "float32",
    "enable_prefix_caching": True,
    "block_size": 32,  # or no prefix of these prompts fills a block
    "skip_tokenizer_init": True,
}
BACKENDS = {
    "plugin": {"plugins": "stem"},
    "transformers": {"plugins": "", "model_impl": "transformers", "trust_remote_code": True},
}


def test_transformers_alone(work, prompts, ours):
    """The export in this environment's transformers, each prompt without the others."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work / "export", trust_remote_code=True
    )
    theirs = []
    for ids in prompts:
        output = model.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=[],
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [logits[0].topk(2).values for logits in output.logits]
        margins = [float(first - second) for first, second in best]
        theirs.append([*zip(output.sequences[0, len(ids) :].tolist(), margins)])
    check_equal(ours, theirs)


@pytest.mark.parametrize("devices", (1, 2))
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens(backend, devices, work, prompts, ours, tmp_path):
    """Compiled, with and without a prefix in the cache."""
    found = vllm(
        tmp_path,
        model=str(work / "export"),
        prompts=prompts,
        tensor_parallel_size=devices,
        **BACKENDS[backend],
        **OF_ALL,
    )
    check_equal(ours, found["first"])
    check_equal(ours, found["again"])
    assert found["cached_tokens"] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_sites(backend, other_site, prompts, tmp_path):
    """Rows in the gate's place, and added; columns of tables on two devices."""
    asked = prompts[:8]
    found = vllm(
        tmp_path,
        model=str(other_site / "export"),
        prompts=asked,
        tensor_parallel_size=2,
        enforce_eager=True,
        **BACKENDS[backend],
        **OF_ALL,
    )
    check_equal(greedy(other_site, asked), found["first"])


# Of value embeddings one device has all.
@pytest.mark.parametrize(
    ("memory", "devices"), (("value", 1), ("per_layer", 2)), indirect=["memory"]
)
def test_other_memories(memory, devices, prompts, tmp_path):
    """By the Transformers backend, compiled: the plugin refuses them."""
    found = vllm(
        tmp_path,
        model=str(memory / "export"),
        prompts=prompts,
        tensor_parallel_size=devices,
        **BACKENDS["transformers"],
        **OF_ALL,
    )
    ours = greedy(memory, prompts)
    check_equal(ours, found["first"])
    check_equal(ours, found["again"])


@pytest.mark.parametrize(
    ("backend", "devices", "message"),
    (
        ("plugin", 1, "has the memories value, which vllm_stem does not know"),
        ("transformers", 2, "32 of 64 values are on this device: value embeddings add rows of all"),
    ),
)
@pytest.mark.parametrize("memory", ("value",), indirect=True)
def test_other_memories_that_are_refused(
    backend, devices, message, memory, prompts, tmp_path, capfd
):
    with pytest.raises(subprocess.CalledProcessError):
        vllm(
            tmp_path,
            model=str(memory / "export"),
            prompts=prompts[:1],
            tensor_parallel_size=devices,
            enforce_eager=True,
            **BACKENDS[backend],
            **OF_ALL,
        )
    said = capfd.readouterr()
    assert message in said.out + said.err
