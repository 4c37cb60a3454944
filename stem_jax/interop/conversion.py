"""A pretrained dense Llama as a STEM model.

The up projection of each chosen layer becomes a table, whose rows begin as what the projection gave
on average for their tokens (`up_means`). Then the tables are trained alone, by the train step that
every run has: with a learning rate of zero for the backbone. The loss on held-out text is taken
before, in between and after.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from stem_jax.config import Config
from stem_jax.config_checks import validate
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError, TrainingError
from stem_jax.interop.calibration_text import CalibrationText
from stem_jax.interop.import_model import Imported
from stem_jax.interop.imports import LazyParams
from stem_jax.interop.names import rows_to_table
from stem_jax.knowledge.up_means import UpMeans
from stem_jax.mesh import make_mesh, replicated
from stem_jax.training.evaluation import Validation
from stem_jax.training.schedule import Schedule, make_schedule
from stem_jax.training.state import Params, TrainState, init_state
from stem_jax.training.step import TrainStep

# Longer sequences say little more about a token, and cost more.
_LONGEST = 512
_PIECE_BYTES = 2**25
# Keys of the configuration that flags of the conversion stand for.
_NOT_FOLLOWED = {
    "optimizer.learning_rate": "--table-rate",
    "tables.lr_multiplier": "--table-rate",
    "optimizer.schedule_steps": "--table-steps",
    "train.steps": "--table-steps",
}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a conversion reads and trains.

    sources: the text, as `data.sources`; None for that of the configuration. tokens: that the means
    are taken over, at most one pass. steps: of training the tables. learning_rate: its peak.
    """

    sources: str | None = None
    tokens: int = 1_000_000
    steps: int = 300
    learning_rate: float = 5e-3

    def __post_init__(self):
        if self.tokens < 1:
            raise InputError(f"--calibration-tokens={self.tokens} must be at least 1")
        if self.steps < 0:
            raise InputError(f"--table-steps={self.steps} must be 0 or more")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"--table-rate={self.learning_rate} must be between 0 and 1")

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """The flags that `from_flags` reads."""
        group = parser.add_argument_group("a Llama as a STEM model")

        def add(name: str, **options) -> None:
            group.add_argument(f"--{name}", f"--{name.replace('-', '_')}", **options)

        add("stem-layers", help="layers whose up projections become tables: as third, or 1,3")
        add("calibration-text", help="as data.sources, for their rows; without it, that")
        add("calibration-tokens", type=int, default=cls.tokens, help="that rows are means over")
        add("table-steps", type=int, default=cls.steps, help="of training the tables alone")
        add("table-rate", type=float, default=cls.learning_rate, help="peak learning rate of it")

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Calibration":
        """Raises InputError for values out of range."""
        return cls(
            args.calibration_text, args.calibration_tokens, args.table_steps, args.table_rate
        )


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """How a conversion went.

    dense, converted, trained: on the same held-out text before the conversion, after it, and after
    the training of the tables (None without). tokens: that the means are taken over. seen_rows:
    rows whose token was among them, of num_rows. steps: of the training.
    """

    layers: tuple[int, ...]
    dense: Validation
    converted: Validation
    trained: Validation | None
    tokens: int
    seen_rows: int
    num_rows: int
    steps: int

    def __str__(self) -> str:
        """A table of the losses."""
        lines = [
            f"layers {', '.join(map(str, self.layers))}: rows of {self.seen_rows:,} of "
            f"{self.num_rows:,} tokens from {self.tokens:,} tokens of text, the others from their "
            "embedding alone",
            f"{f'loss on {self.dense.tokens:,} held-out tokens':<44} nats per token  bits per byte",
            _line("dense", self.dense),
            _line("converted", self.converted),
        ]
        if self.trained is not None:
            lines.append(_line(f"after {self.steps} steps of the tables alone", self.trained))
        return "\n".join(lines)


def check_overrides(overrides: Mapping[str, str]) -> None:
    """Raises InputError for keys that a conversion does not follow."""
    for key, flag in _NOT_FOLLOWED.items():
        if key in overrides:
            raise InputError(
                f"--config.{key}={overrides[key]} does not apply to --stem-layers, whose tables "
                f"are trained as {flag} says; give that, and this one to the run that follows"
            )


def convert(
    imported: Imported,
    config: Config,
    tokenizer: Tokenizer,
    stem_layers: str,
    calibration: Calibration,
) -> tuple[Imported, ConversionReport]:
    """Turns a dense model into a STEM model, on one device.

    Args:
        imported: the dense model.
        config: of it; batch size, optimizer and the held-out share of the text come from here.
        tokenizer: of it.
        stem_layers: as `model.stem_layers`.
        calibration: text and steps.

    Raises:
        InputError: no such layers, or text that cannot be used.
        TrainingError: losses that are not finite.
    """
    config = _calibration_config(config, calibration)
    stem = _stem_config(config, stem_layers)
    layers = stem.model.stem_layers
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        text = CalibrationText.open(config, tokenizer, Path(folder))
        dense, programs = TrainStep(config, mesh), TrainStep(stem, mesh)
        params = _placed(imported, dense)
        before = text.loss(dense, _for_reading(params, dense), make_schedule(config, 1))
        means = UpMeans(dense, params, layers)
        number = min(-(-calibration.tokens // config.tokens_per_step), text.num_batches)
        read = tqdm(range(number), desc="reading", unit="batch")
        means.read(map(text.batches.batch, read))
        counts = means.counts
        state = _first_state(programs, params, means)
        # Their buffers are the state's now, or free.
        del params, means
        schedule = make_schedule(stem, calibration.steps + 1)
        converted, trained = text.loss(programs, state, schedule), None
        if calibration.steps:
            state = _train_tables(programs, state, schedule, text)
            trained = text.loss(programs, state, schedule)
    rows_RxSxF = np.asarray(programs.caught_up_rows(state, schedule))
    table_VxSxF = rows_to_table(rows_RxSxF, programs.spec.layout)
    found = dataclasses.replace(
        imported,
        model={**imported.model, "stem_layers": layers},
        params=LazyParams({name: _maker(imported, name) for name in programs.model.shapes()}),
        tables=[table_VxSxF[:, index] for index in range(len(layers))],
    )
    seen = int((counts > 0).sum())
    return found, ConversionReport(
        layers, before, converted, trained, int(counts.sum()), seen, len(counts), calibration.steps
    )


def _calibration_config(config: Config, calibration: Calibration) -> Config:
    """The run that a conversion makes of the configuration: one device, resident rows."""
    train = dataclasses.replace(
        config.train,
        seq_len=min(config.train.seq_len, _LONGEST),
        steps=max(calibration.steps, 1),
    )
    sources = calibration.sources or config.data.sources
    return dataclasses.replace(
        config,
        train=train,
        data=dataclasses.replace(config.data, sources=sources),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=calibration.learning_rate, schedule_steps=None
        ),
        tables=dataclasses.replace(config.tables, lr_multiplier=1.0, resident_rows=None),
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
    )


def _stem_config(config: Config, stem_layers: str) -> Config:
    model = dataclasses.replace(config.model, stem_layers=stem_layers)
    if not model.stem_layers:
        raise InputError(
            f"--stem-layers={stem_layers} names no layer; leave the flag out to import a dense "
            "model"
        )
    stem = dataclasses.replace(config, model=model)
    validate(stem)
    return stem


def _placed(imported: Imported, programs: TrainStep) -> Params:
    shardings, dtype = programs.shardings.params, programs.config.model.param_dtype
    return {
        name: jax.device_put(jnp.asarray(value, dtype), shardings[name])
        for name, value in imported.params.items()
    }


def _for_reading(params: Params, programs: TrainStep) -> TrainState:
    """A state without the optimizer's."""
    zero = jax.device_put(np.int32(0), replicated(programs.mesh))
    return TrainState(zero, zero, zero, zero, params, None, None)


def _first_state(programs: TrainStep, params: Params, means: UpMeans) -> TrainState:
    """The STEM model with the means as its rows. The parameters that it keeps are donated."""
    spec = programs.spec
    rows = np.zeros((spec.num_rows, spec.num_layers, spec.width), np.float32)
    size = max(1, _PIECE_BYTES // (4 * spec.width))
    for index in range(spec.num_layers):
        for first in range(0, spec.layout.num_keys, size):
            ids = np.arange(first, min(first + size, spec.layout.num_keys))
            rows[spec.layout.row_numbers(ids), index] = means.rows(index, ids)
    placed = jax.device_put(rows, programs.shardings.table.rows)
    kept = {name: params[name] for name in programs.model.shapes()}
    return init_state(programs.config, programs.model, programs.mesh, kept, placed)


def _train_tables(
    programs: TrainStep, state: TrainState, schedule: Schedule, text: CalibrationText
) -> TrainState:
    train = programs.config.train
    # p - 0 * direction is p: the backbone stays as it is, bit for bit.
    frozen = dataclasses.replace(schedule, rates=jnp.zeros_like(schedule.rates))
    with tqdm(range(train.steps), desc="training the tables", unit="step") as steps:
        for step in steps:
            batch = programs.place(text.batches.batch(step))
            state, metrics = programs.update(state, batch, frozen)
            steps.set_postfix_str(f"loss {float(metrics['loss']):.3f}", refresh=False)
            if int(metrics["bad_steps"]) >= train.max_bad_steps:
                raise TrainingError(
                    f"loss or gradients were not finite in {train.max_bad_steps} steps in a row, "
                    f"up to step {step + 1}; lower --table-rate, or look at the text"
                )
    return state


def _maker(imported: Imported, name: str) -> Callable[[], np.ndarray]:
    return lambda: imported.params[name]


def _line(what: str, loss: Validation) -> str:
    return f"  {what:<42} {loss.loss:>14.4f}  {loss.bits_per_byte:>13.4f}"
