"""What the exchange sends and holds as owners grow, by its own sizes: python -m benchmarks.exchange

Nothing runs on devices: tokens are drawn by Zipf's law, and the needs of their batches give the
hops, the sizes and the rounds that a run would take. Each key is in a group's tokens with its
probability, independently, which for many tokens is the same as drawing them.
"""

import argparse
import json
import math
from types import SimpleNamespace

import numpy as np

from stem_jax.mesh import BATCH_AXES
from stem_jax.tables.block_sizes import BlockSizes, choose_sizes
from stem_jax.tables.hops import owner_hops
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec

VOCABULARY, VECTORS, WIDTH, ITEM = 128256, 5, 8192, 2
OWNERS = (16, 64, 256, 1024, 4096, 16384, 65536)
TOKENS = (32768, 4096)


def simulated_mesh(owners: int, slices: int) -> SimpleNamespace:
    """As much of a mesh of TPUs as the exchange asks for."""
    devices = [
        SimpleNamespace(platform="tpu", slice_index=number * slices // owners)
        for number in range(owners)
    ]
    shape = {"data": slices, "fsdp": owners // slices, "context": 1, "tensor": 1}
    return SimpleNamespace(shape=shape, devices=np.array(devices, object))


class Batch:
    """What groups of devices ask for, found from samples of them."""

    def __init__(self, owners: int, slices: int, tokens: int, samples: int, seed: int):
        # Rows are padded so that every owner has as many.
        layout = TableLayout(VOCABULARY, math.lcm(256, owners))
        spec = TableSpec(
            layout, VECTORS, WIDTH, 1.0, BATCH_AXES, "deferred_adamw", 1.0, 0.0, 0.9, 0.95, 1e-8,
            1.0, None,
        )  # fmt: skip
        self.mesh = simulated_mesh(owners, slices)
        self.hops = owner_hops(self.mesh, BATCH_AXES)
        self.table = ShardedTable(spec, self.mesh, tokens)
        self.tokens, self.samples = tokens, samples
        self.rng = np.random.default_rng(seed)
        shares = 1 / np.arange(1, VOCABULARY + 1)
        self.log_absent = np.log1p(-shares / shares.sum())
        self.owner = layout.row_numbers(np.arange(VOCABULARY)) * owners // layout.num_rows
        # Distinct rows of a device, then of the relays after each hop: the mean.
        self.useful: list[float] = []

    def needs(self) -> BlockSizes:
        """The most of each size, over the sampled devices and relays."""
        devices, behind, mask, pairs, rooms = 1, 1, np.zeros(len(self.owner), bool), [], []
        listed = self._lists(devices, mask)
        unique = max(map(len, listed))
        for hop in self.hops:
            self.useful.append(float(np.mean([len(owners) for owners in listed])))
            peers = [owners // hop.stride % hop.peers for owners in listed]
            pairs.append(max(int(np.bincount(p).max(initial=0)) for p in peers))
            devices, behind = devices * hop.peers, behind * hop.peers
            # One relay's rows: those whose owners agree with it in the digits so far.
            digit = self.owner // hop.stride % hop.peers
            mask = mask | (digit != self.rng.integers(hop.peers))
            listed = self._lists(devices, mask)
            rooms.append(max(map(len, listed)))
        return BlockSizes(unique, rooms[-1], tuple(pairs), tuple(rooms[:-1]))

    def _lists(self, devices: int, others: np.ndarray) -> list[np.ndarray]:
        """The owners of the distinct rows of sampled groups of so many devices."""
        keys = np.flatnonzero(~others)
        share = -np.expm1(devices * self.tokens * self.log_absent[keys])
        number = min(self.samples, self.mesh.devices.size)
        return [self.owner[keys[self.rng.random(len(keys)) < share]] for _ in range(number)]


def simulate(owners: int, slices: int, tokens: int, samples: int, seed: int) -> dict:
    """Sizes and costs of one step's exchange."""
    first = Batch(owners, slices, tokens, samples, seed)
    needed = first.needs()
    later = Batch(owners, slices, tokens, samples, seed + 1).needs()
    # The sizes follow the first batch; another one travels.
    sizes = choose_sizes(later, needed, first.table.largest_sizes)
    exchange = ShardedTable(first.table.spec, first.mesh, tokens, sizes).exchange
    padding = [slots / useful for slots, useful in zip(exchange.slots, first.useful, strict=True)]
    found = {
        "owners": owners,
        "slices": slices,
        "tokens": tokens,
        "hops": [hop.peers for hop in exchange.hops],
        "rounds": exchange.rounds,
        "distinct": round(first.useful[0]),
        "padded_over_useful": [round(p, 3) for p in padding],
        "buffer_mib": round(exchange.buffer_bytes(WIDTH * ITEM) / 2**20, 1),
        "sent_rows": sum(n - n // hop.peers for n, hop in zip(exchange.slots, exchange.hops)),
    }
    if slices > 1:
        # All chips of a slice send to their peers in each other one; half the useful rows of the
        # last list stay, with two slices.
        found["between_slices"] = round(exchange.slots[-1] / first.useful[-1], 3)
    return found


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each number of owners."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128, help="devices drawn per hop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    places = [(owners, 1) for owners in OWNERS] + [(128, 2), (512, 2)]
    rows = [
        simulate(owners, slices, tokens, args.samples, args.seed)
        for tokens in TOKENS
        for owners, slices in places
    ]
    if args.json:
        print(json.dumps({"exchange": rows}))
        return
    print("tokens owners slices hops rounds distinct padded/useful buffer_MiB sent_rows between")
    for row in rows:
        hops = "x".join(map(str, reversed(row["hops"])))
        padded = " ".join(map(str, row["padded_over_useful"]))
        print(row["tokens"], row["owners"], row["slices"], hops, row["rounds"], row["distinct"],
              padded, row["buffer_mib"], row["sent_rows"], row.get("between_slices", "-"),
              sep="\t")  # fmt: skip


if __name__ == "__main__":
    main()
