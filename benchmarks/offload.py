"""Training with tables in host memory against resident tables, interleaved in one run.

python -m benchmarks.offload [--shape=toy|cpu|350m|1b] [--resident=0.25] [--rounds=5]

The same steps on the same batches: all rows resident; a share of them, with look-ahead; the same
share without. Tokens follow Zipf's law, each batch drawn afresh. `350m` and `1b` are the shapes of
configs/stem_350m.py and configs/stem_1b.py with 32k tokens a step, for one GPU; `--stem-layers`
and `--contestants` fit the 1B tables to the memory there is.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interleave import interleave, ratio_range, speed_ratio
from benchmarks.train_step import bench_config, random_params, toy_config, zipf_tokens
from stem_jax.config import Config
from stem_jax.config_file import load_config
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import make_mesh
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.spec import TableState
from stem_jax.training.batch import Batch
from stem_jax.training.look_ahead import LookAhead
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state, table_key
from stem_jax.training.step import TrainStep

_STEPS = 100_000
# Settings that make one device of a pod's configuration.
_ONE_DEVICE = {"mesh.data": "1", "mesh.fsdp": "1", "train.micro_batches": "1"}
_CONFIGS = Path(__file__).parent.parent / "configs"


class Run:
    """Steps with rows wherever the configuration puts them; calling it makes some and waits."""

    def __init__(self, config: Config, steps: int):
        self._steps = steps
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        self._programs = TrainStep(config, mesh)
        model = self._programs.model
        self._state = init_state(self._programs.blueprint, random_params(model))
        self._schedule = make_schedule(config, _STEPS)
        spec = self._programs.reads.specs["stem"]
        self._prefetch = None
        if spec.offloaded:
            store = HostStore.create(spec, table_key(config), mesh)
            self._prefetch = Prefetch(
                mesh, store, config.tables.cache_policy, config.tables.prefetch
            )
            table = TableState(**self._prefetch.load())
            self._state = dataclasses.replace(self._state, tables={"stem": table})
        moving = {"stem": self._prefetch} if self._prefetch else {}
        self._ahead = LookAhead(self._programs, self._batches(), _STEPS, moving)
        self.losses: list[float] = []
        self.rows: list[dict[str, float]] = []

    def __call__(self) -> None:
        losses = []
        for ready in itertools.islice(self._ahead, self._steps):
            self._state = self._ahead.place(self._state, ready)
            self._state, metrics = self._programs.update(
                self._state, ready.batch, self._schedule, ready.slots, ready.sizes
            )
            losses.append(metrics["loss"])
            self.rows.append({name: float(value) for name, value in ready.metrics.items()})
        jax.block_until_ready(self._state)
        self.losses += [float(loss) for loss in losses]

    def close(self) -> None:
        """Ends the threads."""
        if self._prefetch is not None:
            self._prefetch.close()

    def _batches(self) -> Iterator[Batch]:
        return (self._batch(zipf_tokens(self._programs.config, seed)) for seed in range(_STEPS))

    def _batch(self, text_BxT: np.ndarray) -> Batch:
        shape = text_BxT[:, 1:].shape

        def place(array, dtype=jnp.int32):
            array = np.asarray(np.broadcast_to(array, shape)[None], dtype)
            return jax.device_put(array, self._programs.batch_sharding)

        return Batch(
            tokens=place(text_BxT[:, :-1]),
            targets=place(text_BxT[:, 1:]),
            positions=place(np.arange(shape[1])),
            segment_ids=place(1),
            loss_mask=place(True, bool),
        )


def shape_config(shape: str, stem_layers: str | None) -> Config:
    """The configuration of a shape, with resident rows."""
    layers = {} if stem_layers is None else {"model.stem_layers": stem_layers}
    if shape in ("toy", "cpu"):
        make = toy_config if shape == "toy" else bench_config
        return make(model__stem_layers=stem_layers or "half")
    batch = {"350m": "16", "1b": "8"}[shape]
    return load_config(
        _CONFIGS / f"stem_{shape}.py",
        {**_ONE_DEVICE, "train.global_batch_size": batch, **layers},
    )


def offloaded(config: Config, share: float, prefetch: int) -> Config:
    """The same with a share of the rows on the device."""
    resident = round(table_specs(config)["stem"].num_rows * share)
    tables = dataclasses.replace(config.tables, resident_rows=resident, prefetch=prefetch)
    return dataclasses.replace(config, tables=tables)


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("toy", "cpu", "350m", "1b"), default="cpu")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of each contestant and round")
    parser.add_argument("--stem-layers", help="as model.stem_layers; default: the shape's")
    parser.add_argument(
        "--contestants", default="resident,prefetch,no prefetch", help="which of them to run"
    )
    parser.add_argument("--profile", type=Path, help="folder for a trace of one turn of each")
    args = parser.parse_args()
    config = shape_config(args.shape, args.stem_layers)
    every = {
        "resident": config,
        "prefetch": offloaded(config, args.resident, 2),
        "no prefetch": offloaded(config, args.resident, 0),
    }
    runs = {name: Run(every[name], args.steps) for name in args.contestants.split(",")}
    work: dict[str, list[float]] = {}
    seconds = interleave(runs, args.rounds, work)
    if args.profile:
        for name, run in runs.items():
            with jax.profiler.trace(args.profile / name.replace(" ", "_")):
                run()
    print(json.dumps(_result(args, config, runs, seconds, work), indent=2))
    for run in runs.values():
        run.close()


def _result(args, config: Config, runs: dict[str, Run], seconds: dict, work: dict) -> dict:
    spec = table_specs(config)["stem"]
    result = {
        "shape": args.shape,
        "tokens_per_step": config.tokens_per_step,
        "table_bytes_with_slots": spec.num_rows * spec.row_bytes(),
        "resident_share": args.resident,
        "step_seconds": {
            name: statistics.median(times) / args.steps for name, times in seconds.items()
        },
        "step_cpu_seconds": {
            name: statistics.median(times) / args.steps for name, times in work.items()
        },
    }
    for name, run in runs.items():
        if name == "resident" or not run.rows:
            continue
        # The first turn warms up: programs are compiled and the cache fills.
        rows = run.rows[args.steps :]
        found = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        found["stall_share"] = found["table/stall_seconds"] / result["step_seconds"][name]
        if "resident" in runs:
            least, most = ratio_range(seconds, "resident", name)
            found |= {
                "step_time_over_resident": speed_ratio(seconds, "resident", name),
                "90%_of_rounds_from": least,
                "90%_of_rounds_to": most,
                "cpu_time_over_resident": speed_ratio(work, "resident", name),
            }
            pairs = zip(run.losses, runs["resident"].losses, strict=True)
            found["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
        result[name] = {key: round(value, 6) for key, value in found.items()}
    result |= {
        "rounds": args.rounds,
        "steps": args.steps,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
    return result


if __name__ == "__main__":
    main()
