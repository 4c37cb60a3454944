"""What a run's metrics say about its training."""

import json
import math

import pytest

from stem_jax.analysis.stability import read_stability


@pytest.fixture
def workdir(tmp_path):
    """write(losses, more of each record): a work folder with these metrics."""

    def write(losses, **more):
        records = [
            {"step": step, "train/loss": loss, "train/grad_norm": 0.5 + step % 2, **more}
            for step, loss in enumerate(losses, start=1)
        ]
        records.append({"step": len(losses), "eval/loss": 1.5})
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "metrics.jsonl").write_text(text)
        return tmp_path

    return write


def losses(steps=80):
    return [2.0 + 0.01 * (step % 5) for step in range(steps)]


def test_spikes_are_found_where_they_are(workdir):
    values = losses()
    values[10] = values[40] = 3.0
    values[60] = None
    found = read_stability(workdir(values, **{"train/skipped_steps": 1}), 80, 1.0, 1.0)
    # Before there are twenty losses nothing is a spike; one that is not finite always is.
    assert found.spikes == [41, 61]
    assert math.isnan(found.losses[60]) and found.record()["losses"][60] is None
    assert found.skipped == 1
    assert found.held_out == [(80, 1.5)]
    assert found.last_loss == pytest.approx((sum(values[30:60]) + sum(values[61:])) / 49)


def test_norms_are_summed_up(workdir):
    found = read_stability(workdir(losses(), **{"train/table_grad_norm": 0.25}), 80, 1.0, 0.2)
    assert found.backbone.largest == 1.5 and found.backbone.median == 1.0
    assert found.backbone.clipped == 0.5
    assert found.tables.clipped == 1.0 and found.tables.p95 == 0.25
    dense = read_stability(workdir(losses()), 80, 1.0, 1.0)
    assert dense.tables is None and dense.table_norms == []


def test_norms_of_memories_are_summed_up(workdir):
    """Each against the norm that it is cut to; of those that were trained."""
    folder = workdir(losses(), **{"train/value_grad_norm": 0.25, "train/ngram_grad_norm": 2.0})
    clip_norms = {"value": 0.2, "ngram": 3.0, "per_layer": 1.0}
    found = read_stability(folder, 80, 1.0, 1.0, clip_norms)
    assert found.tables is None and found.memories.keys() == {"value", "ngram"}
    assert found.memories["value"].clipped == 1.0 and found.memories["ngram"].clipped == 0.0
    assert found.memory_norms["ngram"] == [2.0] * 80


def test_steps_after_the_checkpoint_are_left_out(workdir):
    found = read_stability(workdir(losses()), 30, 1.0, 1.0)
    assert found.steps == list(range(1, 31)) and found.held_out == []


def test_a_run_without_training_has_none(tmp_path, workdir):
    assert read_stability(tmp_path, 10, 1.0, 1.0) is None
    assert read_stability(workdir([]), 10, 1.0, 1.0) is None
