"""Who sees whom in an exported model: as in transformers' Llama, and no other document."""

import pytest
import torch
import transformers

from stem_jax.interop.modeling_stem import StemConfig, StemForCausalLM
from stem_jax.interop.stem_attention import CACHE

CONTEXT = 16
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    # So large that who is seen shows in the logits.
    "initializer_range": 0.5,
}
LENGTHS = [4, 3, 5]
TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def both(request):
    """A model of ours without tables, and transformers' Llama with the same weights."""
    torch.manual_seed(0)
    options = {**SIZES, "attn_implementation": request.param}
    ours = StemForCausalLM(StemConfig(**options)).eval()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    llama.load_state_dict(ours.state_dict())
    return ours, llama


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def with_tables(request):
    torch.manual_seed(0)
    config = StemConfig(**SIZES, stem_layers=[0, 2], attn_implementation=request.param)
    return StemForCausalLM(config).eval()


def _documents(tokens):
    return torch.split(tokens, LENGTHS, dim=1)


def _forbidden(*pairs):
    """An additive mask [1, 1, 12, 12], causal but for (queries, keys) that it forbids too."""
    allowed = torch.tril(torch.ones(12, 12))
    for queries, keys in pairs:
        allowed[queries, keys] = 0
    return ((1 - allowed) * torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_ids": POSITIONS},
        {"position_ids": POSITIONS.expand(2, -1)},
        {"position_ids": torch.cat([POSITIONS, torch.arange(12)[None]])},
        {"position_ids": torch.arange(3, 15)[None]},
        {"position_ids": POSITIONS, "attention_mask": torch.ones(2, 12, dtype=int)},
        {"attention_mask": _forbidden((slice(5, 12), slice(0, 5)))},
        {"attention_mask": _forbidden((slice(8, 9), slice(2, 4))), "position_ids": POSITIONS},
    ],
)
def test_as_llama(options, both):
    ours, llama = both
    with torch.no_grad():
        expected = llama(TOKENS, use_cache=False, **options).logits
        assert expected.abs().max() > 5
        assert torch.equal(ours(TOKENS, use_cache=False, **options).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_as_llama(side, both):
    mask = torch.ones(2, 12, dtype=int)
    mask[0, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    for model in both:
        model.zero_grad()
    # Nor is the first token predicted, from padding.
    labels = TOKENS.masked_fill(mask.cumsum(-1) * mask < 2, -100)
    outputs = [model(TOKENS, attention_mask=mask, labels=labels) for model in both]
    real = mask.bool()
    torch.testing.assert_close(outputs[0].logits[real], outputs[1].logits[real], atol=1e-4, rtol=0)
    gradients = []
    for model, output in zip(both, outputs, strict=True):
        output.loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_documents_in_a_row_are_alone(options, with_tables):
    with torch.no_grad():
        together = with_tables(TOKENS, position_ids=POSITIONS, **options).logits
        alone = torch.cat([with_tables(one).logits for one in _documents(TOKENS)], dim=1)
        across = with_tables(TOKENS, **options).logits
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (across - alone).abs().max() > 1


def test_beams_as_llama(both):
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    found = [model.generate(TOKENS[:, :5], eos_token_id=None, **options) for model in both]
    assert found[0].shape == (2, 9)
    assert torch.equal(*found)


def test_the_collator_of_documents_in_a_row(both, with_tables):
    """Also of more tokens together than the context, which bounds each document."""
    documents = [TOKENS[0, :10], TOKENS[1, :3], TOKENS[1, 3:]]
    features = [{"input_ids": one.tolist()} for one in documents]
    batch = dict(transformers.DataCollatorWithFlattening()(features))
    assert batch["input_ids"].numel() == 22 > CONTEXT
    ours, llama = both
    losses = [model(**batch, use_cache=False).loss for model in (ours, llama)]
    assert torch.equal(*losses)
    losses = [with_tables(one[None], labels=one[None]).loss for one in documents]
    counts = torch.tensor([len(one) - 1 for one in documents])
    mean = (torch.stack(losses) * counts).sum() / counts.sum()
    torch.testing.assert_close(with_tables(**batch).loss, mean)
    features = [{"input_ids": list(range(CONTEXT + 1))}, {"input_ids": [1, 2]}]
    batch = dict(transformers.DataCollatorWithFlattening()(features))
    with pytest.raises(ValueError, match=r"17 tokens are more than .*max_position_embeddings=16 "):
        with_tables(**batch)


def test_a_cache_goes_on(both):
    """Tokens after a cache see all before them, whatever positions they have."""
    for model in both:
        with torch.no_grad():
            whole = model(TOKENS).logits
            cache = model(TOKENS[:, :5], use_cache=True)[CACHE]
            places = torch.arange(5, 12)[None]
            rest = model(TOKENS[:, 5:], position_ids=places, **{CACHE: cache}).logits
        torch.testing.assert_close(rest, whole[:, 5:], atol=1e-4, rtol=0)
