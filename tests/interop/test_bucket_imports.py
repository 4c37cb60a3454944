"""An import into a bucket has the lock of the run that it makes."""

import pytest

from stem_jax import bucket, import_torch
from stem_jax.bucket_lock import BucketLock
from stem_jax.errors import InputError
from stem_jax.interop import import_model
from tests.interop.test_import import few_ids_flags, write_official

pytestmark = pytest.mark.little_effort


@pytest.mark.long
def test_nobody_else_writes_there_meanwhile(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    workdir = s3_bucket.path / "run"
    source = write_official(tmp_path, "dense_small")
    argv = ["--from=official", f"--path={source}", f"--workdir={workdir}", *few_ids_flags(tmp_path)]
    with BucketLock.take(workdir / ".lock"):
        with pytest.raises(InputError, match=f"--workdir={workdir} is in use by process"):
            import_torch.main(argv)
        assert list(bucket.list_objects(workdir)) == [".lock"]
    write, upload = import_model.write_checkpoint, bucket.upload
    taken = []

    def writing(*args, **kwargs):
        taken.append(BucketLock.take(workdir / ".lock"))
        write(*args, **kwargs)

    def uploading(path, target):
        # Whoever finds it held looks for a while.
        if len(taken) < 3:
            taken.append(BucketLock.take(workdir / ".lock"))
        upload(path, target)

    monkeypatch.setattr(import_model, "write_checkpoint", writing)
    monkeypatch.setattr("stem_jax.outgoing.upload", uploading)
    import_torch.main(argv)
    assert len(taken) > 2 and set(taken) == {None}
    names = bucket.list_objects(workdir)
    assert "checkpoints/0/commit_success.txt" in names and ".lock" not in names
