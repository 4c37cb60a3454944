"""What Orbax has to be told for a folder in a bucket.

Orbax writes arrays through TensorStore, which knows S3, but up to 0.12 it makes TensorStore's
addresses of paths and of gs:// alone (google/orbax#2739). Three functions of it decide that; they
are replaced by ones that know s3://, too, when the first folder of S3 is opened.
"""

import functools
import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils
from orbax.checkpoint.path import atomicity

from stem_jax.bucket import prepare_clients, s3_endpoint
from stem_jax.storage import Place, bucket_of, is_remote


def path_class_of(folder: Place) -> Any:
    """Orbax's class for how a checkpoint comes to be there whole or not at all.

    On this machine that is a rename. In a bucket it would be a copy of each object: there a file in
    it, `files.COMMITTED`, comes last and goes first.
    """
    if not is_remote(folder):
        return atomicity.AtomicRenameTemporaryPath
    prepare_clients()
    scheme, _, _ = bucket_of(folder)
    if scheme == "s3":
        _teach_s3()
    return atomicity.CommitFileTemporaryPath


def kept_store(folder: Place) -> str | dict[str, Any]:
    """TensorStore's address of a folder, as it is opened without Orbax."""
    if not is_remote(folder):
        return folder.as_uri()
    prepare_clients()
    address = f"{folder}/"
    return s3_store(address) if address.startswith("s3://") else address


def s3_store(path: str) -> dict[str, Any]:
    """TensorStore's address of a place in S3, by what the environment says of the store."""
    _, bucket, key = bucket_of(path)
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    if endpoint := s3_endpoint():
        found["endpoint"] = endpoint
    if region := os.environ.get("AWS_REGION"):
        found["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # It would complain of files that are not there, on the terminal.
        found["aws_credentials"] = {"type": "environment"}
    return found


@functools.cache
def _teach_s3() -> None:
    of_gs = gcs_utils.get_kvstore_for_gcs
    is_gs, normal = tensorstore_utils._use_gcs_driver, tensorstore_utils._normalize_path

    def store(path: str) -> dict[str, Any]:
        return s3_store(path) if path.startswith("s3://") else of_gs(path)

    def in_bucket(path: str) -> bool:
        return path.startswith("s3://") or is_gs(path)

    def normalized(path: str) -> str:
        return f"s3://{normal(path[5:])}" if path.startswith("s3://") else normal(path)

    gcs_utils.get_kvstore_for_gcs = store
    tensorstore_utils._use_gcs_driver = in_bucket
    tensorstore_utils._normalize_path = normalized
