"""What all tests share: eight CPU devices, a compilation cache, tiny models and their batches."""

import functools
import gc
import os
import signal
import tempfile
import threading

# Whoever starts the tests in the background makes them ignore Ctrl-C, and with them the processes
# that they start; a handler is not inherited.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The user's own flags come last and win.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}".strip()
)
# Two workers share the cores; torch's threads wait for each other busily, four times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# Also of the programs that tests start: nothing is kept in the user's own folder. One folder per
# user: what another user wrote there could be read but not extended.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), f"stem_jax_test_cache_{getattr(os, 'getuid', int)()}"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax
import ml_collections
import numpy as np
import pytest

from configs.base import get_config as base_config
from stem_jax.config import Config
from stem_jax.config_file import build
from stem_jax.mesh import AXES, make_mesh
from stem_jax.training.batch import Batch
from stem_jax.training.step import TrainStep
from tests import (
    cuda_hidden,  # noqa: F401
    effort,
)

# Their fixtures.
pytest_plugins = ["tests.buckets", "tests.hub", "tests.pod"]

# A first call compiles, so no example has a deadline; in CI a failure must repeat.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

# Every size differs from the others, so that a transposed array cannot pass.
_TINY = {
    "model.vocab_size": 88,
    "model.embed_dim": 32,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 48,
    "model.stem_layers": (1, 2),
    "tables.pad_multiple": 32,
    "optimizer.schedule": "constant",
    # Large enough that AdamW does not turn rounding errors of tiny gradients into whole steps.
    "optimizer.epsilon": 1e-5,
    "train.global_batch_size": 8,
    "train.seq_len": 16,
    "train.steps": 20,
    "train.loss_chunk": 8,
}

# The files that take longest, in seconds of CPU, begin; with --long, others do.
_LONGEST_OF_LONG_FIRST = """
multihost earlier offload step readme gpu_benchmark work_folder stacked_layers context_parallelism
real_runs layer_plan offload_processes exchange_processes evaluation_tasks optimizers
evaluation_processes plan llama_conversion levels_ahead float8 export offload_run fine_tuning
tpu_pod_train slurm
hash_moe stem_site memories cost table_memory gpu_plan exchange_hops needle_model
""".split()
_LONGEST_FIRST = """
run tpu_pod_train offload step multihost earlier evaluation_processes exchange_hops import export
offload_faults parity continuing stacked_layers evaluation_scoring edit_measurement resharding
row_optimizer evaluation_tasks generation checkpoint model inference_mesh edit heads_kernel
offloaded_generation loss stop analyze prefetch origin offload_run work_folder tpu_pod slurm
embedding_dropout exported_generation patches exchange perplexity row_sums needle_model
""".split()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run tests that are marked long")
    parser.addoption("--nightly", action="store_true", help="run also those marked nightly")


def pytest_collection_modifyitems(config, items):
    # pytest-xdist gives out files in this order: what runs at the end is small.
    names = _LONGEST_OF_LONG_FIRST if config.getoption("--long") else _LONGEST_FIRST
    place = {f"test_{name}": place for place, name in enumerate(names)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    asked = {name for name in ("long", "nightly") if config.getoption(f"--{name}")}
    left = [name for name in ("long", "nightly") if name not in asked]
    out = [item for item in items if any(map(item.get_closest_marker, left))]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def pytest_collection_finish(session):
    # Modules and tests stay: a tenth of the time went into looking for garbage among them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before fixtures of any scope: compiles as users do, or with little effort.

    Most quick tests ask what a program does, and half of their time was LLVM's. Those that need the
    roundings of users' programs, or read what was compiled, are marked; the long ones are as users
    run them, but for those about processes, their faults and what they say, which are marked, too.
    Programs that should give the same bits give them with little effort too, as each is compiled in
    one part.
    """
    long = item.config.getoption("--long") and not item.get_closest_marker("little_effort")
    effort.set_effort(little=not (long or item.get_closest_marker("optimized")))


def pytest_configure(config):
    # Two test runs may meet in the cache; a lost entry costs a compilation, nothing else.
    for verb in ("reading", "writing"):
        config.addinivalue_line(
            "filterwarnings", f"ignore:Error {verb} persistent compilation cache:UserWarning"
        )


def _config(**overrides) -> Config:
    raw: ml_collections.ConfigDict = base_config()
    for key, value in {**_TINY, **overrides}.items():
        section, name = key.split(".")
        raw[section][name] = value
    return build(raw.to_dict())


@functools.cache
def _mesh(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    axes = AXES if len(shape) == len(AXES) else ("data", "fsdp", "tensor")
    sizes = dict(zip(axes, shape, strict=True))
    config = _config(**{f"mesh.{axis}": size for axis, size in sizes.items()}).mesh
    return make_mesh(config, jax.devices()[: int(np.prod(shape))])


@functools.cache
def _train_step(shape: tuple[int, ...], overrides: tuple, little: str) -> TrainStep:
    return TrainStep(_config(**dict(overrides)), _mesh(shape))


@pytest.fixture(autouse=True)
def _threads_of_others():
    """See `offloading.row_threads`."""
    from tests.offloading import THREADS_OF_OTHERS

    THREADS_OF_OTHERS.clear()
    THREADS_OF_OTHERS.update(threading.enumerate())


@pytest.fixture(autouse=True)
def _sigterm_as_it_was():
    """Programs that a test starts inherit that it is ignored."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(**{"section.key": value}): a configuration of a three-layer model."""
    return _config


@pytest.fixture(scope="session")
def device_mesh():
    """device_mesh((data, fsdp, tensor)), or all of AXES: a mesh over the first devices."""
    return _mesh


@pytest.fixture(scope="session")
def train_step():
    """train_step(mesh shape, **overrides): a TrainStep, compiled once for all tests."""

    def compiled(shape=(1, 1, 1), **overrides):
        # Programs of one effort are not those of another.
        little = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
        return _train_step(shape, tuple(overrides.items()), little)

    return compiled


@pytest.fixture(scope="session")
def make_batch():
    """make_batch(step, seed): a random global batch of the step's configuration, in its place.

    Each sequence is two documents, split at a random point; `ragged` pads the ends of sequences.
    """

    def make(step: TrainStep, seed: int = 0, ragged: bool = False) -> Batch:
        train, rng = step.config.train, np.random.default_rng(seed)
        B, L = train.global_batch_size, train.seq_len
        text_BxT = rng.integers(0, step.config.model.vocab_size, (B, L + 1), dtype=np.int32)
        places_L = np.arange(L, dtype=np.int32)
        split_B = rng.integers(1, L, (B, 1), dtype=np.int32)
        length_B = rng.integers(1, L + 1, (B, 1)) if ragged else np.full((B, 1), L)
        second_BxL = places_L >= split_B
        real_BxL = places_L < length_B
        fields = {
            "tokens": text_BxT[:, :-1],
            "targets": text_BxT[:, 1:],
            "positions": np.where(second_BxL, places_L - split_B, places_L),
            "segment_ids": np.where(real_BxL, 1 + second_BxL, 0).astype(np.int32),
            "loss_mask": real_BxL,
        }
        return step.place(fields)

    return make
