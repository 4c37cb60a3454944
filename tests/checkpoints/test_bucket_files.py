"""Files of a checkpoint in a bucket: an error of the network is no damage of theirs."""

import json

import pytest

from stem_jax import bucket as objects
from stem_jax.checkpoints.chain import mark_of, saved_bases
from stem_jax.checkpoints.file_list import LIST, difference, read_list, write_list
from stem_jax.checkpoints.files import ASIDE, COMMITTED, set_aside_damaged
from stem_jax.errors import InputError
from tests.buckets import Answer


@pytest.fixture
def checkpoint(bucket):
    """One whose table builds on another, and that is whole."""
    folder = bucket.path / "run" / "checkpoints" / "8"
    layout = {"format": 4, "table_base": {"step": 4, "number": 1, "mark": 0}}
    objects.put(folder / "layout" / "metadata", json.dumps(layout).encode())
    objects.put(folder / "params" / "ocdbt.process_0" / "d" / "1", b"content")
    part = {"ocdbt.process_0/d/1": [7, 0x57BB9CF0]}
    objects.put(folder / "params" / "written_by_0.json", json.dumps(part).encode())
    write_list(folder)
    objects.put(folder / COMMITTED, b"")
    return folder


def test_files_are_listed_and_compared(checkpoint):
    listed = read_list(checkpoint)
    # As the process said it, whose list is gone.
    assert listed.keys() == {"layout/metadata", "params/ocdbt.process_0/d/1"}
    assert listed["params/ocdbt.process_0/d/1"] == [7, 0x57BB9CF0]
    reason = difference(checkpoint, verify=True)
    assert reason.startswith("params/ocdbt.process_0/d/1 has the checksum")
    objects.put(checkpoint / "params" / "ocdbt.process_0" / "d" / "1", b"shorter")
    objects.remove_object(checkpoint / "layout" / "metadata")
    assert difference(checkpoint) == "layout/metadata is missing"
    assert mark_of(checkpoint, "stem") is not None
    objects.remove_object(checkpoint / LIST)
    assert mark_of(checkpoint, "stem") is None


def test_a_store_that_answers_nothing_has_no_damaged_checkpoint(checkpoint, bucket):
    assert saved_bases(checkpoint)["stem"].step == 4
    denied = Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
    for path in ("files.json", "layout", ""):
        bucket.proxy.answers = [Answer(403, denied.body, path=path)]
        with pytest.raises(InputError, match="no permission for the bucket"):
            set_aside_damaged(checkpoint.parent)
        if path != "files.json":
            with pytest.raises(InputError, match="no permission"):
                saved_bases(checkpoint)
    bucket.proxy.reset()
    assert not objects.list_objects(checkpoint.parent.parent / ASIDE)
