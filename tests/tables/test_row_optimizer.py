"""Deferred AdamW against dense AdamW: the same table, whatever was touched when."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from stem_jax.errors import InputError
from stem_jax.run_checks import check_first_start
from stem_jax.tables.coast_groups import GROUP_EDGES, group_edges, num_terms
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.row_coast import RowBlock, catch_up
from stem_jax.tables.row_optimizer import RowOptimizer
from stem_jax.tables.spec import TableSpec, TableState, logical, stored
from stem_jax.tables.update_history import make_history

pytestmark = pytest.mark.little_effort
ROWS, LAYERS, WIDTH, STEPS, TOKENS = 256, 1, 16, 600, 48


def make_spec(**changes) -> TableSpec:
    return dataclasses.replace(
        TableSpec(
            layout=TableLayout(ROWS, 256),
            vectors=LAYERS,
            width=WIDTH,
            init_std=0.05,
            vocab_axes=(),
            optimizer="deferred_adamw",
            lr_multiplier=1.0,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            clip_norm=1.0,
            capacity=None,
        ),
        **changes,
    )


def warmup_cosine(steps: int, peak: float = 1e-3, warmup: int = 50) -> np.ndarray:
    step = np.arange(steps)
    cosine = 0.1 + 0.45 * (1 + np.cos(np.pi * (step - warmup) / max(steps - warmup, 1)))
    return peak * np.where(step < warmup, step / warmup, cosine)


@functools.cache
def zipf_run():
    """Distinct rows [T, O] of each step (ROWS pads) and their gradients [T, O, S, F]."""
    rng = np.random.default_rng(3)
    weights = 1 / np.arange(1, ROWS + 1)
    rows = np.full((STEPS, TOKENS), ROWS, np.int32)
    for step in range(STEPS):
        found = np.unique(rng.choice(ROWS, TOKENS, p=weights / weights.sum()))
        rows[step, : len(found)] = found
    scale = 10.0 ** rng.uniform(-6, -2, (ROWS + 1, 1, 1))
    gradients = rng.normal(size=(STEPS, TOKENS, LAYERS, WIDTH)) * scale[rows]
    start = rng.normal(size=(ROWS, LAYERS, WIDTH)) * 0.05
    return rows, gradients.astype(np.float32), start.astype(np.float32)


def every_term_its_own(spec: TableSpec) -> tuple[int, ...]:
    return tuple(range(1, num_terms(spec.beta1, spec.beta2) + 1))


def whole_table(spec: TableSpec, edges=None) -> np.ndarray:
    """The table after the Zipf run, every row caught up."""
    rows, gradients, start = zipf_run()
    optimizer = RowOptimizer(spec, edges)
    history = jax.tree.map(jnp.asarray, make_history(spec, warmup_cosine(STEPS + 1)))

    @jax.jit
    def run(start):
        zeros = jnp.zeros_like(start)
        state = TableState(start, zeros, zeros, jnp.zeros(start.shape[1], jnp.int32))

        def one(state, piece):
            step, rows_O, gradient = piece
            return optimizer.update(state, rows_O, stored(gradient), step, True, history), None

        state, _ = jax.lax.scan(one, state, (jnp.arange(STEPS), rows, gradients))
        return optimizer.read(state, jnp.arange(ROWS), jnp.int32(STEPS), history).rows

    return np.asarray(logical(run(stored(start))))


@pytest.mark.parametrize("epsilon", [1e-8, pytest.param(1e-3, marks=pytest.mark.long)])
def test_600_zipf_steps_against_dense(epsilon):
    dense = whole_table(make_spec(optimizer="dense_adamw", epsilon=epsilon))
    five = whole_table(make_spec(epsilon=epsilon))
    assert np.abs(five - dense).max() <= 1e-4
    spec = make_spec(epsilon=epsilon)
    every_term = whole_table(spec, every_term_its_own(spec))
    assert np.abs(every_term - dense).max() <= 1e-6


def test_lazy_is_another_optimizer():
    dense = whole_table(make_spec(optimizer="dense_adamw"))
    lazy = whole_table(make_spec(optimizer="lazy_adamw"))
    assert np.abs(lazy - dense).max() > 5e-3


@pytest.mark.parametrize("optimizer", ["deferred_adamw", "lazy_adamw"])
@pytest.mark.parametrize("number", [5, 8, 20, 24, 27])
def test_rows_in_pieces_are_rows_at_once(optimizer, number):
    """As TPUs work, 8 rows of a vector at a time: pieces that overlap, padding, nothing kept."""
    spec = make_spec(optimizer=optimizer)
    rng = np.random.default_rng(number)
    arrays = rng.normal(size=(3, LAYERS, 30, WIDTH)).astype(np.float32)
    last_step = jnp.asarray(rng.integers(0, 6, 30), jnp.int32)
    state = TableState(arrays[0], arrays[1], arrays[2] ** 2, last_step)
    history = jax.tree.map(jnp.asarray, make_history(spec, warmup_cosine(20)))
    rows_O = jnp.asarray([*rng.permutation(30)[: number - 2], 30, 30], jnp.int32)
    gradient = rng.normal(size=(LAYERS, number, WIDTH)).astype(np.float32)

    def both(piece, keep):
        rule = RowOptimizer(spec, piece=piece)

        @jax.jit
        def run(state, gradient, keep):
            read = rule.read_as(state, rows_O, 7, history, jnp.bfloat16)
            return read, rule.update(state, rows_O, gradient, jnp.int32(7), keep, history, 0.5)

        return jax.device_get(run(state, gradient, keep))

    for keep in (True, False):
        for at_once, in_pieces in zip(
            *(jax.tree.leaves(both(piece, keep)) for piece in (None, 8)), strict=True
        ):
            np.testing.assert_allclose(
                np.float32(in_pieces), np.float32(at_once), rtol=3e-7, atol=1e-7
            )
    assert np.array_equal(both(8, False)[1].rows, arrays[0])


def coast(spec: TableSpec, rates, rows, mu, nu, start: int, end: int):
    """Dense AdamW without gradients from update start + 1 to `end`, in float64."""
    rates = np.asarray(rates, np.float64)
    for step in range(start + 1, end + 1):
        mu, nu = spec.beta1 * mu, spec.beta2 * nu
        corrected = mu / (1 - spec.beta1**step)
        scale = np.sqrt(nu / (1 - spec.beta2**step)) + spec.epsilon
        rate = rates[step - 1]
        rows = rows * (1 - rate * spec.weight_decay) - rate * corrected / scale
    return rows, mu, nu


# Every attempt to shrink a failure would trace hundreds of terms again.
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(
    beta2=st.floats(0.5, 0.999),
    ratio=st.floats(0.0, 0.94),
    decay=st.floats(0.0, 0.5),
    last=st.integers(0, 3000),
    gap=st.integers(0, 5000),
    warmup=st.integers(1, 2000),
    epsilon=st.sampled_from([1e-8, 1e-3]),
)
@example(beta2=0.95, ratio=0.9 / 0.95**0.5, decay=0.1, last=1, gap=5000, warmup=10, epsilon=1e-8)
@example(beta2=0.5, ratio=5e-324, decay=0.1, last=699, gap=103, warmup=169, epsilon=1e-8)
@example(beta2=0.95, ratio=0.0, decay=0.1, last=0, gap=3, warmup=10, epsilon=1e-8)
def test_catching_up_is_coasting(beta2, ratio, decay, last, gap, warmup, epsilon):
    spec = make_spec(beta1=ratio * beta2**0.5, beta2=beta2, weight_decay=decay, epsilon=epsilon)
    rng = np.random.default_rng(last * 7 + gap)
    shape = (1, 1, WIDTH)
    # Moments as gradients leave them: |m| at most about sqrt(v); a row never touched has none.
    root = 10.0 ** rng.uniform(-6, -2, shape) * (last > 0)
    rows = rng.normal(size=shape) * 0.05
    mu, nu = root * rng.uniform(-1, 1, shape), root**2
    rates = warmup_cosine(last + gap + 1, warmup=warmup)
    block = RowBlock(*(jnp.asarray(x, jnp.float32) for x in (rows, mu, nu)))
    history = jax.tree.map(jnp.asarray, make_history(spec, rates))
    found = _catch_up(spec, block, last, last + gap, history, every_term_its_own(spec))
    grouped = _catch_up(spec, block, last, last + gap, history, None)
    expected = coast(spec, np.float32(rates), rows, mu, nu, last, last + gap)
    moved = np.abs(expected[0] - rows).max()
    np.testing.assert_allclose(found.rows, expected[0], atol=1e-6 + 1e-4 * moved)
    # The groups cost 1% of what the momentum moves the row at a constant rate, and up to 2.6% in a
    # warm-up, which gives late terms more weight.
    np.testing.assert_allclose(grouped.rows, expected[0], atol=1e-6 + 0.03 * moved)
    np.testing.assert_allclose(found.mu, expected[1], rtol=2e-3, atol=1e-12)
    np.testing.assert_allclose(found.nu, expected[2], rtol=2e-3, atol=1e-14)


def _catch_up(spec, block, last, step, history, edges):
    return catch_up(spec, block, jnp.full(1, last, jnp.int32), jnp.int32(step), history, edges)


def coast_share(beta1: float, beta2: float, edges=None) -> float:
    """The largest error of a catch-up at a constant rate, as a share of the coasting.

    Second moments from where epsilon decides alone to where it decides nothing.
    """
    spec = make_spec(beta1=beta1, beta2=beta2, weight_decay=0.0, epsilon=1e-8)
    gap, last = num_terms(beta1, beta2), 3000
    root = 10.0 ** np.linspace(-9, 4, 64)[None, None]
    rates = np.full(last + gap + 1, 1e-3)
    block = RowBlock(*(jnp.asarray(x, jnp.float32) for x in (0 * root, root, root**2)))
    history = jax.tree.map(jnp.asarray, make_history(spec, rates))
    found = _catch_up(spec, block, last, last + gap, history, edges)
    rows, mu, nu = (np.asarray(x, np.float64) for x in (block.rows, block.mu, block.nu))
    expected, _, _ = coast(spec, np.float32(rates), rows, mu, nu, last, last + gap)
    return float(np.max(np.abs(np.asarray(found.rows) / expected - 1)))


@pytest.mark.parametrize(
    ("beta1", "beta2", "allowed"),
    [
        (0.9, 0.95, 0.0055),
        (0.9, 0.999, 0.001),
        (0.95, 0.95, 0.01),
        (0.9, 0.9, 0.01),
        (0.96, 0.95, 0.01),
        (0.6, 0.5, 0.01),
        (0.99, 0.99, 0.01),
    ],
)
def test_groups_follow_the_betas(beta1, beta2, allowed):
    assert coast_share(beta1, beta2) <= allowed


def test_the_usual_groups_are_wrong_for_betas_that_are_alike():
    """By a fourteenth of the coasting; and for the usual betas every one of them is needed."""
    assert coast_share(0.95, 0.95, GROUP_EDGES) > 0.06
    assert coast_share(0.9, 0.95, GROUP_EDGES[:-1]) > 0.0055


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.999), (0, 0.95)])
def test_usual_betas_keep_their_groups(betas):
    """And with them the bits of runs under way."""
    assert group_edges(*betas) == (1, 2, 4, 8, 16)


def test_betas_with_which_rows_coast_for_too_long_are_refused_at_the_first_start(tiny_config):
    keys = {"optimizer.beta1": 0.974, "optimizer.beta2": 0.95}
    config = tiny_config(**keys)
    with pytest.raises(InputError, match=r"beta1=0\.974 is so close to .* coasts for 29,"):
        check_first_start(config)
    check_first_start(tiny_config(**keys, **{"tables.optimizer": "dense_adamw"}))
    check_first_start(tiny_config(**keys, **{"model.stem_layers": "none"}))


def test_never_touched_rows_only_decay():
    spec = make_spec()
    history = make_history(spec, warmup_cosine(1001))
    rows = jnp.full((1, 2, 4), 0.5)
    zeros = jnp.zeros_like(rows)
    found = catch_up(
        spec, RowBlock(rows, zeros, zeros), jnp.zeros(2, jnp.int32), jnp.int32(1000), history
    )
    factor = np.prod(1 - np.float64(np.float32(warmup_cosine(1001)[:1000])) * spec.weight_decay)
    np.testing.assert_allclose(found.rows, 0.5 * factor, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["deferred_adamw", "lazy_adamw", "dense_adamw"])
def test_padding_and_skipped_updates_change_nothing(optimizer):
    spec = make_spec(optimizer=optimizer)
    history = jax.tree.map(jnp.asarray, make_history(spec, warmup_cosine(20, warmup=1)))
    rng = np.random.default_rng(0)
    rows, mu = rng.normal(size=(2, LAYERS, ROWS, WIDTH)).astype(np.float32)
    state = TableState(rows, mu, mu**2, np.full(ROWS, 3, np.int32))
    state = jax.tree.map(jnp.asarray, state)
    asked = jnp.array([5, 9, ROWS, ROWS], jnp.int32)
    gradient = jnp.full((LAYERS, 4, WIDTH), jnp.nan)
    update = jax.jit(RowOptimizer(spec).update)
    kept = update(state, asked, gradient, jnp.int32(7), jnp.bool_(False), history)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(before, after)
    gradient = jnp.where((asked < ROWS)[:, None], 0.1, gradient)
    moved = update(state, asked, gradient, jnp.int32(7), jnp.bool_(True), history)
    assert np.isfinite(moved.rows).all()
    changed = np.flatnonzero((np.asarray(moved.rows) != rows).any(axis=(0, 2)))
    assert changed.tolist() == ([5, 9] if optimizer != "dense_adamw" else list(range(ROWS)))
    assert np.flatnonzero(np.asarray(moved.last_step) != 3).tolist() == [5, 9]


def test_decay_that_turns_the_sign_is_refused():
    with pytest.raises(InputError, match=r"tables\.lr_multiplier"):
        make_history(make_spec(lr_multiplier=2e4), warmup_cosine(100))


def test_betas_whose_terms_do_not_die_out_are_refused(tiny_config):
    with pytest.raises(InputError, match=r"optimizer\.beta1=0\.98 must be less than"):
        tiny_config(**{"optimizer.beta1": 0.98})
    tiny_config(**{"optimizer.beta1": 0.98, "tables.optimizer": "dense_adamw"})
