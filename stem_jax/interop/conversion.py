"""A pretrained dense Llama as a STEM model.

The up projection of each chosen layer becomes a table, whose rows begin as what the projection gave
on average for their tokens (`up_means`). Then the tables are trained alone, by the train step that
every run has (`optimizer.train=tables`). The loss on held-out text is taken before, in between and
after.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from stem_jax.analysis.up_means import UpMeans
from stem_jax.config import Config
from stem_jax.config_checks import validate
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError, TrainingError
from stem_jax.interop.calibration import Calibration
from stem_jax.interop.calibration_text import CalibrationText
from stem_jax.interop.import_model import Imported
from stem_jax.interop.imports import LazyParams
from stem_jax.interop.names import rows_to_table
from stem_jax.layer_patterns import layer_indices
from stem_jax.memory.memory import STEM
from stem_jax.mesh import make_mesh, replicated
from stem_jax.tables.spec import logical, stored
from stem_jax.training.blueprint import Params
from stem_jax.training.evaluation import Validation
from stem_jax.training.schedule import Schedule, make_schedule
from stem_jax.training.state import TrainState, init_state
from stem_jax.training.step import TrainStep

# Longer sequences say little more about a token, and cost more.
_LONGEST = 512
_PIECE_BYTES = 2**25


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
    rows_SxRxF = np.asarray(programs.caught_up_rows(state, schedule)[STEM])
    layout = programs.reads.specs[STEM].layout
    table_VxSxF = rows_to_table(logical(rows_SxRxF), layout)
    found = dataclasses.replace(
        imported,
        model={**imported.model, "stem_layers": layers},
        params=LazyParams({name: _maker(imported, name) for name in programs.model.shapes()}),
        tables=[table_VxSxF[:, index] for index in range(len(layers))],
        table_names={},
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
        mesh=config.mesh.on_one_device(),
    )


def _stem_config(config: Config, stem_layers: str) -> Config:
    layers = layer_indices("--stem-layers", stem_layers, config.model.num_layers)
    if not layers:
        raise InputError(
            f"--stem-layers={stem_layers} names no layer; leave the flag out to import a dense "
            "model"
        )
    model = dataclasses.replace(config.model, stem_layers=layers)
    optimizer = dataclasses.replace(config.optimizer, train="tables")
    stem = dataclasses.replace(config, model=model, optimizer=optimizer)
    validate(stem)
    return stem


def _placed(imported: Imported, programs: TrainStep) -> Params:
    specs = programs.model.specs()
    return {
        name: jax.device_put(
            jnp.asarray(value, jnp.float32), NamedSharding(programs.mesh, specs[name])
        )
        for name, value in imported.params.items()
    }


def _for_reading(params: Params, programs: TrainStep) -> TrainState:
    """A state without the optimizer's."""
    zero = jax.device_put(np.int32(0), replicated(programs.mesh))
    return TrainState(zero, zero, zero, {}, params, None, {})


def _first_state(programs: TrainStep, params: Params, means: UpMeans) -> TrainState:
    """The STEM model with the means as its rows. The parameters that it keeps are donated."""
    spec = programs.reads.specs[STEM]
    rows = np.zeros(spec.shape("rows"), np.float32)
    size = max(1, _PIECE_BYTES // (spec.row_bytes("rows") // spec.vectors))
    for index in range(spec.vectors):
        for first in range(0, spec.layout.num_keys, size):
            ids = np.arange(first, min(first + size, spec.layout.num_keys))
            rows[spec.layout.row_numbers(ids), index] = means.rows(index, ids)
    placed = jax.device_put(stored(rows), programs.shardings.tables[STEM].rows)
    kept = {name: params[name] for name in programs.model.shapes()}
    return init_state(programs.blueprint, kept, {STEM: placed})


def _train_tables(
    programs: TrainStep, state: TrainState, schedule: Schedule, text: CalibrationText
) -> TrainState:
    train = programs.config.train
    with tqdm(range(train.steps), desc="training the tables", unit="step") as steps:
        for step in steps:
            batch = programs.place(text.batches.batch(step))
            state, metrics = programs.update(state, batch, schedule)
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
    return f"  {what:<42} {loss.loss:>14.4f}  {loss.bits_per_byte:>13.4f}{loss.caution}"
