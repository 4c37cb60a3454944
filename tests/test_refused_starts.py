"""A start that is refused leaves a run in a bucket as it was."""

import pytest

from stem_jax import bucket as objects
from stem_jax.bucket_files import seen
from stem_jax.bucket_lock import BucketLock
from stem_jax.config_file import load_config
from stem_jax.errors import InputError
from stem_jax.local_copy import VARIABLE
from stem_jax.run import Ending, train
from stem_jax.standing.standing import standing
from tests import launching

VALUES = launching.SMALL | {"train.steps": 2, "eval.every": 0}


def begin(workdir, **overrides) -> Ending:
    values = VALUES | {key.replace("__", "."): value for key, value in overrides.items()}
    return train(load_config("configs/tiny.py", {k: str(v) for k, v in values.items()}), workdir)


def contents(workdir) -> dict[str, tuple]:
    """Of each object what a listing says."""
    return dict(objects.list_objects(workdir))


@pytest.mark.long
@pytest.mark.little_effort
def test_nothing_is_written(s3_bucket, tmp_path, monkeypatch):
    workdir = s3_bucket.path / "run"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "a"))
    for _ in range(2):
        with pytest.raises(InputError, match="names no steps"):
            begin(workdir, train__profile_steps="5-4")
        assert not contents(workdir)
    assert begin(workdir) is Ending.COMPLETED
    before = contents(workdir)
    assert "logs/process_000.log" in before and "goodput/process_000.jsonl" in before
    # On this machine, on another one, and once more there.
    for machine in "abb":
        monkeypatch.setenv(VARIABLE, str(tmp_path / machine))
        with pytest.raises(InputError, match=r"model\.embed_dim"):
            begin(workdir, model__embed_dim=64)
        assert contents(workdir) == before
    with BucketLock.take(workdir / ".lock"):
        held = contents(workdir)
        with pytest.raises(InputError, match="is in use by process"):
            begin(workdir, train__steps=3)
        assert contents(workdir) == held
    assert standing(seen(str(workdir), "--workdir")).state == "complete"
    # Nor does a later start bring what those said.
    assert begin(workdir) is Ending.WAS_COMPLETE
    assert "embed_dim" not in (workdir / "logs/process_000.log").read_text()
