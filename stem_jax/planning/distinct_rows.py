"""How many distinct rows of a memory the tokens of a step ask for, before there is a run.

Counted in the first batch where `data.sources` are token stores; else what is to be expected.
Nothing here costs what a table has rows: a batch's keys at the most.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.data.loader import GlobalBatches
from stem_jax.data.sources import is_store_folder, parse_sources, stores_folder
from stem_jax.data.token_store import TokenStore
from stem_jax.memory.catalogue import memories, with_eos
from stem_jax.mesh import TOKEN_AXES, axis_size
from stem_jax.model.row_reads import row_reads
from stem_jax.tables.block_sizes import BlockSizes, expected_distinct, expected_needs
from stem_jax.tables.hops import owner_hops
from stem_jax.tables.sharded_table import ShardedTable

# Groups of devices whose keys are counted; the others have as many distinct ones, about.
_GROUPS = 8
_PADDING = -1


@dataclasses.dataclass(frozen=True)
class DistinctRows:
    """of: rows that the keys of so many devices have together. keys: of one device and step.
    origin: how that is known, for readers.
    """

    of: Callable[[int], float]
    keys: int
    origin: str


def step_distinct_rows(config: Config, mesh: Mesh) -> dict[str, DistinctRows]:
    """What a step asks of each memory.

    Raises:
        InputError: a token store that is damaged, or has more ids than the model.
    """
    devices = axis_size(mesh, TOKEN_AXES)
    tokens = config.tokens_per_step // devices
    stores = _stores(config)
    enough = sum(store.num_tokens for store, _ in stores) >= config.tokens_per_step
    if stores and enough:
        return _counted(config, stores, devices)
    few = "" if not stores else "; data.sources have fewer tokens than a step"
    # Which token ends n-grams changes no size.
    reads, found = row_reads(with_eos(config, 0)), {}
    for name, memory in reads.memories.items():
        keys = tokens * reads.keys_of_a_token(name)
        if memory.reach:
            origin = f"expected if no n-gram came twice, a bound{few}"
            found[name] = DistinctRows(_of_hashes(keys, memory.num_keys), keys, origin)
        else:
            origin = f"expected by Zipf's law{few}"
            found[name] = DistinctRows(_of_tokens(tokens, zipf_shares(config)), keys, origin)
    return found


def needs_of(distinct: DistinctRows, table: ShardedTable) -> BlockSizes:
    """Sizes that such a step needs of a table, as it exchanges rows."""
    spec, mesh, largest = table.spec, table.mesh, table.largest_sizes
    hops = owner_hops(mesh, spec.vocab_axes)
    devices, owners = axis_size(mesh, TOKEN_AXES), axis_size(mesh, spec.vocab_axes)
    copies = devices // owners
    needed = expected_needs(distinct.of, spec.layout.num_keys, hops, owners, copies)
    pairs = zip(needed.numbers, largest.numbers, strict=True)
    return largest.with_numbers([min(number, most) for number, most in pairs])


def zipf_shares(config: Config) -> np.ndarray:
    """[V] probability of each token, inverse to its rank.

    Text repeats itself more than tokens that are drawn so, and has fewer distinct ones.
    """
    shares = 1 / np.arange(1, config.model.vocab_size + 1)
    return shares / shares.sum()


def _of_tokens(tokens: int, shares_V: np.ndarray) -> Callable[[int], float]:
    return lambda devices: expected_distinct(devices * tokens, shares_V)


def _of_hashes(keys: int, num_keys: int) -> Callable[[int], float]:
    """Of keys that fall evenly on all numbers below `num_keys`."""

    def distinct(devices: int) -> float:
        return num_keys * -math.expm1(devices * keys * math.log1p(-1 / num_keys))

    return distinct


def _stores(config: Config) -> list[tuple[TokenStore, float]]:
    """The training text, where all of it is prepared."""
    sources = parse_sources(config.data.sources)
    if not all(is_store_folder(source.source) for source in sources):
        return []
    folders = [stores_folder(source.source) / "train" for source in sources]
    size = config.model.vocab_size
    stores = [TokenStore.open(folder, vocab_size=size) for folder in folders]
    return [(store, source.weight) for store, source in zip(stores, sources, strict=True)]


def _counted(
    config: Config, stores: list[tuple[TokenStore, float]], devices: int
) -> dict[str, DistinctRows]:
    train = config.train
    batches = GlobalBatches(
        stores,
        seed=train.seed,
        seq_len=train.seq_len,
        global_batch_size=train.global_batch_size,
        packing=config.data.packing,
    )
    batch = batches.batch(0)
    origin = f"counted in the first batch of {config.data.sources}"
    return {
        name: _counted_of(memory, batch, devices, origin)
        for name, memory in memories(with_eos(config, stores[0][0].ends[1])).items()
    }


def _counted_of(memory, batch, devices: int, origin: str) -> DistinctRows:
    segments = batch["segment_ids"]
    keys = np.array(memory.keys(batch["tokens"], segments))
    keys[segments == 0] = _PADDING
    # Neighbours in the batch as neighbours in the mesh.
    keys_PxN = keys.reshape(devices, -1)

    @functools.cache
    def distinct(together: int) -> float:
        groups = keys_PxN.reshape(devices // together, -1)
        some = groups[:: -(-len(groups) // _GROUPS)]
        return float(np.mean([np.count_nonzero(np.unique(g) != _PADDING) for g in some]))

    return DistinctRows(distinct, keys_PxN.shape[1], origin)
