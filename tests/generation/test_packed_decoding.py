"""Models that read n-grams, decoded: logits of documents are those of training, wherever they lie.

Prompts of one batch are packed behind other documents, padded on either side, or both; some are
shorter than the longest n-gram, and than what the convolution reaches back to.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import keys_on_the_host, memories, table_specs
from stem_jax.model.cache import NewCache
from stem_jax.model.inputs import Inputs, RowIndex
from stem_jax.model.memory_rows import MemoryRows
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.offloaded_rows import OffloadedRows
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import Blueprint, ModelDef
from stem_jax.training.state import init_state, table_key

EOS, V, L = 5, 88, 32
# Tokens of documents; eos stands at the start, inside, at the end, and twice in a row.
LENGTHS = (1, 2, 3, 6, 30, 17, 14, 9)
EOS_AT = ((), (0,), (2,), (2, 3), (4, 5, 11, 29), (0, 1, 16), (7, 8, 12, 13), (8,))
# Of each as a prompt: its tokens, what stands before it in its row (a document, by its number;
# a number below 0: so much padding), and the padding behind fills the row.
PROMPTS = (
    (0, 1, ()),
    (1, 1, (-3,)),
    (2, 2, (7, -4)),
    (3, 4, (-5, 6)),
    (4, 21, ()),
    (5, 6, (-26,)),
    (6, 5, (5, 7, 0)),
    (7, 1, (2, 3, -1, 1)),
)
READERS = {
    "engram": {"ngram.layers": (0, 1)},
    "value": {"ngram.layers": (1,), "ngram.reader": "value"},
    "embedding": {"ngram.layers": (0,), "ngram.reader": "embedding"},
}


def _documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    found = []
    for length, places in zip(LENGTHS, EOS_AT, strict=True):
        tokens = rng.integers(6, V, length, np.int32)
        tokens[list(places)] = EOS
        found.append(tokens)
    return found


DOCUMENTS = _documents()


@dataclasses.dataclass(frozen=True)
class Model:
    """config, its parameters and the rows of its memories, [S, rows, F]."""

    config: object
    params: dict
    tables: dict

    @functools.cached_property
    def forward(self):
        """forward(inputs, rows): logits at every position, as training computes them."""
        model = ModelDef(self.config)

        @jax.jit
        def logits(params, inputs, rows):
            bound = model.bind(params)
            return bound.logits(bound(inputs, rows).hidden)

        return functools.partial(logits, self.params)

    def logits(self, tokens_BxL, segments_BxL) -> np.ndarray:
        """What training computes: keys of the loader, the rows of each key taken from its table."""
        found = memories(self.config)
        keys = keys_on_the_host(found)(tokens_BxL, segments_BxL) | {"stem": tokens_BxL}
        rows, index, specs = {}, {}, table_specs(self.config)
        for name in found:
            numbers = specs[name].layout.row_numbers(keys[name].reshape(-1))
            rows[name] = self.tables[name][:, numbers]
            places = np.arange(keys[name].size, dtype=np.int32)
            index[name] = RowIndex(places.reshape(keys[name].shape))
        positions_BxL = np.zeros_like(tokens_BxL)
        for row, segments_L in zip(positions_BxL, segments_BxL, strict=True):
            for number in np.unique(segments_L):
                own = segments_L == number
                row[own] = np.arange(own.sum())
        inputs = Inputs(tokens_BxL, positions_BxL, segments_BxL, index)
        return np.asarray(self.forward(inputs, rows))

    @functools.cached_property
    def alone(self) -> list[np.ndarray]:
        """Of each document its logits, each in a row of its own."""
        tokens_BxL = np.stack([np.pad(tokens, (0, L - len(tokens))) for tokens in DOCUMENTS])
        segments_BxL = (np.arange(L) < np.array(LENGTHS)[:, None]).astype(np.int32)
        found = self.logits(tokens_BxL, segments_BxL)
        return [logits[:length] for logits, length in zip(found, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def make_model(tiny_config, device_mesh):
    """make_model(reader, N, **overrides): a model whose parameters are all drawn, and large."""

    @functools.cache
    def make(reader: str, max_order: int, **overrides) -> Model:
        head_dim = 12 if max_order == 4 else 8
        config = tiny_config(
            **{
                "model.num_layers": 2,
                "model.stem_layers": (1,),
                "tables.init_std": 1.0,
                "ngram.init_std": 1.0,
                "ngram.max_order": max_order,
                "ngram.heads": 2 if max_order == 2 else 1,
                # As wide as the values of all KV heads.
                "ngram.width": 2 * head_dim,
                "model.head_dim": head_dim,
                "ngram.keys_per_head": 900,
                "ngram.eos_id": EOS,
                "train.seq_len": L,
            }
            | READERS[reader]
            | overrides
        )
        state = init_state(Blueprint(config, device_mesh((1, 1, 1))))
        rng = np.random.default_rng(1)
        params = {
            # The taps of convolutions and the norms too, which begin as zeros and ones.
            name: np.asarray(value) + 0.3 * rng.normal(size=value.shape).astype(np.float32)
            for name, value in sorted(state.params.items())
        }
        rows = {name: np.asarray(table.rows) for name, table in state.tables.items()}
        return Model(config, params, rows)

    return make


def _laid_out() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, L] of PROMPTS, numbers of their documents, and where each prompt ends."""
    tokens_BxL, segments_BxL = np.zeros((2, len(PROMPTS), L), np.int32)
    # What is in padding nobody should see.
    tokens_BxL += np.arange(L, dtype=np.int32) + 6
    ends = []
    for tokens, segments, (number, read, before) in zip(
        tokens_BxL, segments_BxL, PROMPTS, strict=True
    ):
        at, segment = 0, 1
        parts = [None if p < 0 else DOCUMENTS[p] for p in before]
        for part, size in zip(parts, before, strict=True):
            if part is None:
                at -= size
                continue
            tokens[at : at + len(part)], segments[at : at + len(part)] = part, segment
            at, segment = at + len(part), segment + 1
        tokens[at : at + read], segments[at : at + read] = DOCUMENTS[number][:read], segment
        ends.append(at + read)
    return tokens_BxL, segments_BxL, np.array(ends, np.int32)


def _decoded(model: Model, rows: dict) -> list[dict[int, np.ndarray]]:
    """Of each prompt the logits after so many of its document's tokens, by decoding."""
    generator = Generator(model.config, model.params, rows, None)
    served, advance = MemoryRows(memories(model.config), rows), jax.jit(generator.advance)
    tokens_BxL, segments_BxL, ends_B = _laid_out()
    caches = [NewCache(2 * L)] * model.config.model.num_layers
    prompt_rows = served.serve(tokens_BxL, segments_BxL)
    logits_BxV, read = advance(
        model.params, prompt_rows, tokens_BxL, ends_B, caches, segment_ids_BxL=segments_BxL
    )
    found, seen = [{} for _ in PROMPTS], [read for _, read, _ in PROMPTS]
    while True:
        for logits_V, at, of_one in zip(np.asarray(logits_BxV), seen, found, strict=True):
            of_one[at] = logits_V
        token = [
            DOCUMENTS[number][min(at, LENGTHS[number] - 1)]
            for at, (number, *_) in zip(seen, PROMPTS, strict=True)
        ]
        token_Bx1, ones_B = np.array(token, np.int32)[:, None], np.ones(len(token), np.int32)
        if all(at >= LENGTHS[number] for at, (number, *_) in zip(seen, PROMPTS, strict=True)):
            return found
        seen = [at + 1 for at in seen]
        before = served.serve(token_Bx1, before_BxR=read[2])
        logits_BxV, read = advance(model.params, before, token_Bx1, ones_B, *read)


def _resident(model: Model) -> dict:
    specs = table_specs(model.config)
    return {
        name: ResidentRows(jnp.asarray(model.tables[name]), specs[name], None) for name in specs
    }


SHORT = [("engram", 4), ("value", 3), ("embedding", 2)]
ALL = [
    pytest.param(reader, order, marks=[] if (reader, order) in SHORT else pytest.mark.long)
    for reader in READERS
    for order in (2, 3, 4)
]


@pytest.mark.parametrize(("reader", "max_order"), ALL)
def test_packed_and_padded_documents_have_the_logits_that_they_have_alone(
    make_model, reader, max_order
):
    model = make_model(reader, max_order)
    tokens_BxL, segments_BxL, ends_B = _laid_out()
    packed = model.logits(tokens_BxL, segments_BxL)
    compared = 0
    for logits, segments, end, (number, read, before) in zip(
        packed, segments_BxL, ends_B, PROMPTS, strict=True
    ):
        order = [part for part in before if part >= 0]
        np.testing.assert_allclose(
            logits[end - read : end], model.alone[number][:read], atol=1e-4, rtol=0
        )
        for segment, document in enumerate(order, 1):
            own = logits[segments == segment]
            np.testing.assert_allclose(own, model.alone[document], atol=1e-4, rtol=0)
            compared += len(own)
    assert compared > 30


@pytest.mark.parametrize(("reader", "max_order"), ALL)
def test_decoding_goes_on_with_the_last_document_of_a_row(make_model, reader, max_order):
    model = make_model(reader, max_order)
    compared = 0
    for (number, *_), of_one in zip(PROMPTS, _decoded(model, _resident(model)), strict=True):
        for at, logits_V in of_one.items():
            if at <= LENGTHS[number]:
                expected_V = model.alone[number][at - 1]
                np.testing.assert_allclose(logits_V, expected_V, atol=1e-4, rtol=0)
                compared += 1
    assert compared == sum(LENGTHS[number] - read + 1 for number, read, _ in PROMPTS)


def test_few_rows_on_the_device_give_the_same(make_model, device_mesh):
    model, mesh = make_model("engram", 4), device_mesh((1, 1, 1))
    few = {"tables.resident_rows": 64, "ngram.resident_rows": 640}
    config = make_model("engram", 4, **few).config
    stores = {
        name: HostStore.create(spec, table_key(config, name), mesh, moments=False)
        for name, spec in table_specs(config).items()
    }
    rows = {name: OffloadedRows(store, mesh, "lfu") for name, store in stores.items()}
    assert {name: source.spec.num_slots for name, source in rows.items()} == {
        "stem": 64,
        "ngram": 640,
    }
    found, expected = _decoded(model, rows), _decoded(model, _resident(model))
    for source in rows.values():
        source.close()
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for at, logits_V in one.items():
            np.testing.assert_allclose(logits_V, other[at], atol=1e-5, rtol=0)
            assert logits_V.argmax() == other[at].argmax()


def test_greedy_tokens_are_those_of_training(make_model):
    model, new = make_model("engram", 4), 8
    generator = Generator(model.config, model.params, _resident(model), None)
    prompts = [DOCUMENTS[number][:read].tolist() for number, read in ((0, 1), (3, 4), (5, 13))]
    drawn = list(generator.steps(prompts, new, Sampling(temperature=0.0)))
    tokens_BxL, segments_BxL = np.zeros((2, 8, L), np.int32)
    for row, segments, *text in zip(tokens_BxL, segments_BxL, prompts, zip(*drawn, strict=True)):
        whole = [token for part in text for token in part]
        row[: len(whole)], segments[: len(whole)] = whole, 1
    best_BxL = model.logits(tokens_BxL, segments_BxL).argmax(-1)
    for best_L, prompt, tokens in zip(best_BxL, prompts, zip(*drawn, strict=True)):
        assert best_L[len(prompt) - 1 :][:new].tolist() == list(tokens)
    assert len({*map(tuple, zip(*drawn, strict=True))}) == 3
