"""Paths in object stores, `gs://` and `s3://`: what a path with a scheme may be."""

import importlib
from typing import Any

from transformer.config.schema import ConfigError

CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""Package, and the extra that brings it, by scheme."""


def remote(url: str) -> Any:
    """Returns the path that a URL names, an `etils.epath.Path`, which reads and writes as a `pathlib.Path` does.

    Raises ConfigError for a URL that names no directory in a store that can be used here.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in CLIENTS:
        raise ConfigError(f"{url!r}: a path begins with {' or '.join(f'{name}://' for name in CLIENTS)}, or is local")
    if not all(rest.strip("/").partition("/")[::2]):
        raise ConfigError(f"{url!r}: name a bucket and a directory in it, {scheme}://BUCKET/DIRECTORY")
    package, extra = CLIENTS[scheme]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{url!r} needs the package {package}: pip install -e '.[{extra}]'") from error
    from etils import epath

    # Kept lists of objects would hide what other processes write.
    importlib.import_module("fsspec.config").conf.setdefault(scheme, {})["use_listings_cache"] = False
    return epath.Path(url)
