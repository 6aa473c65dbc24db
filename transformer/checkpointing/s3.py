"""Orbax on `s3://`, which TensorStore can write to and Orbax, as of 0.12, cannot name.

What Orbax does on `gs://` needs only what S3 has as well: TensorStore's driver for the arrays, a path that reads and
writes small files, and, as nothing can be renamed, an object written last that marks a checkpoint as whole. So these
paths are made to count as such; the functions are internal ones, and the tests of a run on S3 tell if they change.
"""

import functools
import os
from typing import Any


def teach_orbax(path: str) -> None:
    """Lets Orbax read and write checkpoints at `path`, if it is on S3."""
    if path.startswith("s3://"):
        _teach()


@functools.cache
def _teach() -> None:
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for module, names in (
        (gcs_utils, "_GCS_PATH_PREFIX get_kvstore_for_gcs"),
        (tensorstore_utils, "_use_gcs_driver _normalize_path"),
    ):
        missing = [name for name in names.split() if not hasattr(module, name)]
        assert not missing, f"{module.__name__} of this Orbax has no {', '.join(missing)}: s3:// has to be taught anew"
    of_gcs: Any = gcs_utils.get_kvstore_for_gcs
    changes: list[tuple[Any, str, Any]] = [
        (gcs_utils, "_GCS_PATH_PREFIX", ("gs://", "s3://")),
        (gcs_utils, "get_kvstore_for_gcs", lambda path: _driver(path) if path.startswith("s3://") else of_gcs(path)),
        (tensorstore_utils, "_use_gcs_driver", lambda path: path.startswith(("gs://", "s3://"))),
        (tensorstore_utils, "_normalize_path", _normalized),
    ]
    for module, name, value in changes:
        setattr(module, name, value)


def _normalized(path: str) -> str:
    scheme, separator, rest = path.rpartition("://")
    return scheme + separator + os.path.normpath(rest)


def _driver(path: str) -> dict[str, Any]:
    """Returns TensorStore's description of a directory on S3, or on the server that AWS_ENDPOINT_URL names."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return spec | ({"endpoint": endpoint} if endpoint else {}) | ({"aws_region": region} if region else {})
