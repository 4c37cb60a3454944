"""The loop: dispatch a step, then read the metrics of the step before.

Stages by step distance: batches beyond t+n are read ahead on threads; up to batch t+n rows are on
their way (`look_ahead`); step t runs; metrics of step t-1 are fetched, so the host never waits for
the step it has just started. The loop drains (fetches the last metrics) before validation, before a
save, and at the end.

Told to stop, it saves at once: a validation that is due, or under way, is left to the next start.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from tqdm import tqdm

from stem_jax.config import Config
from stem_jax.errors import DivergedError
from stem_jax.goodput.account import COMPUTING, RECORDS, SAVE, VALIDATION
from stem_jax.goodput.progress import Progress
from stem_jax.hardware import chip_of
from stem_jax.model.cost import training_flops_per_token
from stem_jax.processes.process_log import log
from stem_jax.processes.start_clock import StartClock
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.row_slots import TooFewSlots
from stem_jax.training.evaluation import Validation, summarize
from stem_jax.training.levels_ahead import LevelsAhead
from stem_jax.training.look_ahead import LookAhead, Ready
from stem_jax.training.metrics import MetricsLog, SpikeCounter
from stem_jax.training.past_updates import NO_PAST, PastUpdates
from stem_jax.training.run_data import RunData
from stem_jax.training.schedule import Schedule, make_schedule
from stem_jax.training.state import TrainState
from stem_jax.training.step import TrainStep
from stem_jax.training.step_trace import StepTrace, traced_steps
from stem_jax.training.trackers.tracking import Tracking


@dataclasses.dataclass
class Loop:
    """Trains from a state to `train.steps`, or until asked to stop.

    Attributes:
        prefetches: of offloaded tables, by memory.
        save: called where a checkpoint is due, with (state, validation or None, whether a stop came
            before it).
        add_validation: called with (step, validation) that the checkpoint of the step lacks.
        stop_requested: asked before the first step and after every one, and after every batch of a
            validation.
        beat: told what was just done, several times a minute if all is well.
        clock: of the start, read at the first step.
        past: see `schedule.learning_rates`.
        progress: is told where the run is, and where its time goes.
        tracking: what follows the records of the run.
    """

    config: Config
    programs: TrainStep
    data: RunData
    workdir: Path
    prefetches: dict[str, Prefetch]
    save: Callable[[TrainState, Validation | None, bool], None]
    add_validation: Callable[[int, Validation], None]
    stop_requested: Callable[[], bool]
    beat: Callable[[str], None] = lambda place: None
    clock: StartClock = dataclasses.field(default_factory=StartClock)
    past: PastUpdates = NO_PAST
    progress: Progress = dataclasses.field(default_factory=Progress)
    tracking: Tracking | None = None

    def run(
        self, state: TrainState, owes_validation: bool = False
    ) -> tuple[TrainState, Validation | None, bool]:
        """Returns the final state, the validation of the last step, and whether all was done.

        Args:
            owes_validation: a stop came before the one of the state's step.

        Raises:
            DivergedError: `train.max_bad_steps` non-finite steps in a row.
        """
        start, end = int(state.step), self.config.train.steps
        progress = self.progress
        progress.began(start, end, self.config.tokens_per_step)
        if self.stop_requested():
            # While they started, one of several processes was told so.
            return state, None, False
        mesh = self.programs.mesh
        schedule = make_schedule(self.config, end + 1, past=self.past, mesh=mesh)
        metrics_log = MetricsLog(
            self.workdir,
            start,
            writing=jax.process_index() == 0,
            tracking=self.tracking,
            awaits=self._evaluation_due,
        )
        reporter = _Reporter(
            self.config, metrics_log, self.clock, self.programs.mesh.devices.size, start, progress
        )
        trace = StepTrace(traced_steps(self.config.train.profile_steps), self.workdir)
        validation, saved = None, start
        try:
            if owes_validation:
                state, validation = self._validate(state, schedule, start, metrics_log, owed=True)
                if validation is None:
                    return state, None, False
                reporter.resume_clock()
            with self.data.batches.iterate(start) as batches:
                ahead = self._look_ahead(batches, end - start)
                levels = LevelsAhead(self.programs)
                for step in range(start + 1, end + 1):
                    trace.before(step, state)
                    ready = self._next(ahead, state, saved, reporter)
                    state = ahead.place(state, ready)
                    with progress.part(progress.account.starting):
                        levels.await_step(ready)
                    with progress.part(COMPUTING):
                        state, metrics = self.programs.update(
                            state, ready.batch, schedule, ready.slots, ready.sizes
                        )
                        trace.after(step, (state, metrics))
                    reporter.dispatched(step, metrics | ready.metrics)
                    with progress.part(COMPUTING):
                        levels.after_step(state, ready, schedule)
                    self.beat(f"step {step - 1}")
                    stopped = self.stop_requested()
                    evaluation_due = self._evaluation_due(step)
                    checkpoint_due = self._checkpoint_due(step)
                    if stopped or evaluation_due or checkpoint_due:
                        reporter.drain()
                    validation = None
                    if evaluation_due and not stopped:
                        state = ahead.settle(state)
                        state, validation = self._validate(state, schedule, step, metrics_log)
                        stopped = validation is None
                    owed = evaluation_due and validation is None
                    if stopped or checkpoint_due:
                        self._save(state, validation, owed)
                        saved = step
                        self.beat(f"the save of step {step}")
                    if evaluation_due or checkpoint_due:
                        reporter.resume_clock()
                    if stopped or step == end:
                        progress.account.ending()
                        return state, validation, step == end and not owed
        finally:
            trace.close()
            reporter.close()
            metrics_log.close()
        return state, validation, True

    def _look_ahead(self, batches: Iterable, length: int, *, training: bool = True) -> LookAhead:
        placed = map(self.programs.place, batches)
        account = self.progress.account
        return LookAhead(
            self.programs, placed, length, self.prefetches, training=training, account=account
        )

    def _next(
        self, ahead: LookAhead, state: TrainState, saved: int, reporter: "_Reporter"
    ) -> Ready:
        """The next batch. If its rows do not fit, what was trained so far is saved first."""
        try:
            return next(ahead)
        except TooFewSlots:
            reporter.drain()
            if int(state.step) != saved:
                self._save(state, None, False)
            raise

    def _save(self, state: TrainState, validation: Validation | None, owed: bool) -> None:
        with self.progress.long(SAVE):
            step = int(state.step)
            self.progress.save_begun(step)
            self.save(state, validation, owed)

    def _evaluation_due(self, step: int) -> bool:
        due = step == self.config.train.steps or _due(step, self.config.eval.every)
        return due and self.data.held_out is not None

    def _checkpoint_due(self, step: int) -> bool:
        return step == self.config.train.steps or _due(step, self.config.checkpoint.every)

    def _validate(
        self,
        state: TrainState,
        schedule: Schedule,
        step: int,
        metrics_log: MetricsLog,
        owed: bool = False,
    ) -> tuple[TrainState, Validation | None]:
        """The state, and what came out; None if told to stop meanwhile.

        owed: the checkpoint of the step is there, without it.
        """
        with self.progress.long(VALIDATION):
            return self._validated(state, schedule, step, metrics_log, owed)

    def _validated(
        self,
        state: TrainState,
        schedule: Schedule,
        step: int,
        metrics_log: MetricsLog,
        owed: bool,
    ) -> tuple[TrainState, Validation | None]:
        held_out, sums = self.data.held_out, []
        assert held_out is not None
        ahead = self._look_ahead(held_out, len(held_out), training=False)
        for _ in range(len(held_out)):
            try:
                ready = next(ahead)
            except TooFewSlots:
                if not owed:
                    self._save(ahead.settle(state), None, True)
                raise
            state = ahead.place(state, ready)
            sums.append(
                self.programs.evaluate(state, ready.batch, schedule, ready.slots, ready.sizes)
            )
            # Two batches in flight keep the devices busy; with all of them a wish to stop would be
            # heard at the start and at the end.
            sums[-2:-1] = jax.device_get(sums[-2:-1])
            self.beat(f"validation batch {len(sums)} at step {step}")
            if self.stop_requested():
                return ahead.settle(state), None
        result = summarize(sums, held_out.num_bytes, held_out.left_out)
        if owed and self._checkpoint_due(step):
            # Before the record, by which a next start sees that nothing is owed any more.
            self.add_validation(step, result)
        metrics_log.write(step, result.metrics())
        log.info(
            f"step {step}: validation loss {result.loss:.4f} nats per token, "
            f"{result.bits_per_byte:.4f} bits per byte{result.caution}"
        )
        return state, result


class _Reporter:
    """Reads metrics one step late, logs them, and moves the progress bar."""

    def __init__(
        self,
        config: Config,
        metrics_log: MetricsLog,
        clock: StartClock,
        num_devices: int,
        start: int,
        progress: Progress,
    ):
        self._config = config
        self._progress = progress
        self._log = metrics_log
        self._clock = clock
        self._pending: tuple[int, dict] | None = None
        logged = [r["train/loss"] for r in metrics_log.records if "train/loss" in r]
        # A non-finite loss is logged as null.
        losses = [math.nan if loss is None else loss for loss in logged]
        self._spikes = SpikeCounter(losses)
        self._flops = training_flops_per_token(config, config.train.seq_len)
        chip = chip_of(jax.devices()[0])
        self._peak = chip.peak(config.model.matmul_dtype) * num_devices if chip else None
        self._bar = tqdm(
            total=config.train.steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=jax.process_index() > 0,
        )
        self.resume_clock()

    def resume_clock(self) -> None:
        """Leaves out of the speed what happened since the last step."""
        self._last = time.perf_counter()

    def dispatched(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step just dispatched, and reports the one before."""
        self.drain()
        self._pending = (step, metrics)

    def drain(self) -> None:
        """Waits for the step in flight and reports it."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        with self._progress.part(COMPUTING):
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._clock.running:
            values["startup_seconds"] = self._clock.stop(step)
        self._progress.step_done(step, values["loss"], seconds)
        with self._progress.part(RECORDS):
            self._report(step, values, seconds)

    def _report(self, step: int, values: dict, seconds: float) -> None:
        self._spikes.add(values["loss"])
        self._bar.update(1)
        tokens_per_second = self._config.tokens_per_step / seconds
        self._bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False
        )
        bad = values.pop("bad_steps")
        if step % self._config.train.log_every == 0 or bad or step == self._config.train.steps:
            self._write(step, values, seconds, tokens_per_second)
        if bad >= self._config.train.max_bad_steps:
            raise DivergedError(
                f"loss or gradients were not finite in {bad} steps in a row, up to step {step} "
                f"(train.max_bad_steps={self._config.train.max_bad_steps}); those updates were "
                "skipped and the last checkpoint stands. Lower optimizer.learning_rate, or look "
                "at the data"
            )

    def _write(self, step: int, values: dict, seconds: float, tokens_per_second: float) -> None:
        # Those of a memory say so.
        record = {name if "/" in name else f"train/{name}": v for name, v in values.items()}
        flops = self._flops * tokens_per_second
        record |= {
            "train/loss_spikes": self._spikes.count,
            "train/step_seconds": seconds,
            "train/tokens_per_second": tokens_per_second,
            "train/matmul_tflops_per_second": flops / 1e12,
        }
        if self._peak:
            record["train/mfu"] = flops / self._peak
        self._log.write(step, record)

    def close(self) -> None:
        self._bar.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
