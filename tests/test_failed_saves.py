"""A save that fails in one process of a run in a bucket ends that process at once."""

import pytest

from stem_jax import bucket as objects
from stem_jax.local_copy import VARIABLE
from tests import launching
from tests.buckets import Answer
from tests.children import finish, gang, train_flags

DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'


@pytest.mark.long
@pytest.mark.little_effort
def test_the_others_are_not_waited_for(s3_bucket, tmp_path):
    """They wait for it, at another place, until train.step_timeout is over."""
    workdir = s3_bucket.path / "run"
    argv = train_flags("tiny", workdir, launching.SMALL, {"checkpoint__every": 2})
    where = {VARIABLE: str(tmp_path), **s3_bucket.environment}
    # Process 0 alone writes it.
    s3_bucket.proxy.answers = [Answer(403, DENIED, method="PUT", path="commit_success")]
    first, second = gang("stem_jax.train", argv, argv, **where)
    with first as one, second:
        said = finish(one, 1)
    assert f"no permission for the bucket {s3_bucket.name}" in said
    assert "commit_success.txt" not in " ".join(objects.list_objects(workdir))
