"""Hit rates of the row cache on real text, by policy, slots and half life.

python -m benchmarks.cache_policies [--json] [--vocab-size=32768] [--batch-tokens=2048]

One shard holds all rows. Each batch is assigned while the two before it are pinned, as in training
with two batches of look-ahead. At first the rows of the lowest token ids are resident. `static` is
the best that rows chosen once could do: those most often asked for in the very batches that are
measured, by row and by token each their own, and never a batch that does not fit.

The text is the built-in corpora `stdlib` and `pydoc`, in three orders:
    documents   shuffled documents one after another: a batch is about one thing
    sequences   shuffled sequences of 256 tokens, as the loader draws them
    change      sequences of `stdlib` alone, then of `pydoc` alone; only the latter are measured
"""

import argparse
import collections
import dataclasses
import json
import platform
import tempfile
from pathlib import Path

import numpy as np

from stem_jax.data.corpora import read_corpus
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.row_cache import HALF_LIFE, CacheTooSmall, RowCache

CORPORA = ("stdlib", "pydoc")
SHARES = (0.05, 0.1, 0.25, 0.5)
HALF_LIVES = (4, 16, 32, 64, 128, 256, 512, np.inf)
IN_FLIGHT = 2
SEQUENCE = 256


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches of one order of the text.

    Attributes:
        batches: (distinct rows [n] int64, rising, and how many tokens have each [n]) of each batch.
        first: the first batch that is measured.
    """

    batches: list[tuple[np.ndarray, np.ndarray]]
    first: int = 0

    def pinned(self, number: int) -> np.ndarray:
        """Rows of the batches in flight before batch `number`."""
        earlier = self.batches[max(0, number - IN_FLIGHT) : number]
        return np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in earlier)])

    def largest_window(self) -> int:
        """The most distinct rows that are needed at a time."""
        return max(
            len(np.union1d(rows, self.pinned(number)))
            for number, (rows, _) in enumerate(self.batches)
        )


def read_documents(vocab_size: int) -> dict[str, list[np.ndarray]]:
    """Token ids [n] of each document of each corpus, by a tokenizer trained on all of them."""
    texts = {name: list(read_corpus(name)) for name in CORPORA}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tokenizer.model"
        train_sentencepiece([text for name in CORPORA for text in texts[name]], model, vocab_size)
        tokenizer = load_tokenizer("sentencepiece", model)
    return {
        name: [np.array([tokenizer.bos_id, *ids]) for ids in tokenizer.encode_batch(texts[name])]
        for name in CORPORA
    }


def make_streams(
    documents: dict[str, list[np.ndarray]], layout: TableLayout, batch_tokens: int
) -> dict[str, Stream]:
    """The three orders of the text, by name."""
    rng = np.random.default_rng(0)

    def batches(ids: np.ndarray):
        whole = ids[: len(ids) // batch_tokens * batch_tokens].reshape(-1, batch_tokens)
        return [np.unique(layout.row_numbers(one), return_counts=True) for one in whole]

    def sequences(documents: list[np.ndarray]):
        ids = np.concatenate(documents)
        whole = ids[: len(ids) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)
        return batches(rng.permutation(whole).reshape(-1))

    every = [document for name in CORPORA for document in documents[name]]
    before, after = (sequences(documents[name]) for name in CORPORA)
    return {
        "documents": Stream(
            batches(np.concatenate([every[i] for i in rng.permutation(len(every))]))
        ),
        "sequences": Stream(sequences(every)),
        "change": Stream(before + after, first=len(before)),
    }


def measure(stream: Stream, cache: RowCache) -> dict[str, float]:
    """Shares of rows and of tokens that are resident when a batch asks for them.

    If a batch does not fit: the slots it needs instead.
    """
    asked, missed = np.zeros(2), np.zeros(2)
    for number, (rows, tokens) in enumerate(stream.batches):
        try:
            missing = cache.assign(rows, stream.pinned(number)).missing
        except CacheTooSmall as error:
            return {"needed": error.needed}
        if number >= stream.first:
            asked += len(rows), tokens.sum()
            missed += len(missing), tokens[np.searchsorted(rows, missing)].sum()
    return _rates(1 - missed / asked)


def measure_static(stream: Stream, num_rows: int, num_slots: int) -> dict[str, float]:
    """The same shares for the rows that are asked for most, in hindsight."""
    asked = np.zeros((2, num_rows))
    for rows, tokens in stream.batches[stream.first :]:
        asked[0, rows] += 1
        asked[1, rows] += tokens
    return _rates(np.sort(asked)[:, -num_slots:].sum(1) / asked.sum(1))


def _rates(shares: np.ndarray) -> dict[str, float]:
    return {"rows": round(float(shares[0]), 4), "tokens": round(float(shares[1]), 4)}


def compare(stream: Stream, layout: TableLayout, half_life: float) -> list[dict]:
    """One record for each number of slots; `half_lives` holds what lfu makes of each."""
    records = []
    for share in SHARES:
        num_slots = int(share * layout.num_rows)
        resident = layout.row_numbers(np.arange(num_slots))

        def run(policy: str, half_life: float = half_life, resident=resident) -> dict[str, float]:
            return measure(stream, RowCache(resident, layout.num_rows, policy, half_life))

        records.append(
            {
                "slots": num_slots,
                "lfu": run("lfu"),
                "lru": run("lru"),
                "static": measure_static(stream, layout.num_rows, num_slots),
                "half_lives": {f"{length:g}": run("lfu", length) for length in HALF_LIVES},
            }
        )
    return records


def worst_shortfall(streams: dict[str, dict]) -> dict[str, float]:
    """For each half life, how far its hit rate by row lies below the best one's, at most."""
    worst = collections.defaultdict(float)
    for stream in streams.values():
        for record in stream["slots"]:
            found = {length: rates.get("rows") for length, rates in record["half_lives"].items()}
            if None not in found.values():
                for length, rate in found.items():
                    worst[length] = max(worst[length], round(max(found.values()) - rate, 4))
    return dict(worst)


def print_tables(result: dict) -> None:
    """Hit rates in percent, by row / by token."""

    def cell(rates: dict[str, float]) -> str:
        if "needed" in rates:
            return f"needs {rates['needed']}"
        return f"{100 * rates['rows']:.1f} / {100 * rates['tokens']:.1f}"

    def line(first, cells) -> None:
        print(f"{first:>7}", *(f"{text:>12}" for text in cells))

    print(f"vocabulary {result['vocab_size']}, {result['batch_tokens']} tokens a batch;", end=" ")
    print("hits in percent, by row / by token")
    for name, stream in result["streams"].items():
        print(f"\n{name}: {stream['measured_batches']} batches of {stream['mean_rows']:.0f} rows,")
        print(f"at most {stream['largest_window']} in a batch and the {IN_FLIGHT} before it")
        policies = ("lfu", "lru", "static")
        line("slots", policies)
        for record in stream["slots"]:
            line(record["slots"], [cell(record[policy]) for policy in policies])
        print("by half life of lfu, in batches")
        line("slots", stream["slots"][0]["half_lives"])
        for record in stream["slots"]:
            line(record["slots"], [cell(rates) for rates in record["half_lives"].values()])
    print("\npoints by row below the best half life, at worst")
    line("", result["worst_shortfall"])
    line("", [f"{100 * short:.1f}" for short in result["worst_shortfall"].values()])


def main() -> None:
    """Runs the benchmark and prints tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--half-life", type=float, default=HALF_LIFE, help="of lfu, in batches")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args()
    layout = TableLayout(args.vocab_size, 256)
    streams = make_streams(read_documents(args.vocab_size), layout, args.batch_tokens)
    result = vars(args) | {"streams": {}, "python": platform.python_version()}
    del result["json"]
    for name, stream in streams.items():
        result["streams"][name] = {
            "measured_batches": len(stream.batches) - stream.first,
            "mean_rows": round(float(np.mean([len(rows) for rows, _ in stream.batches])), 1),
            "largest_window": stream.largest_window(),
            "slots": compare(stream, layout, args.half_life),
        }
    result["worst_shortfall"] = worst_shortfall(result["streams"])
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
