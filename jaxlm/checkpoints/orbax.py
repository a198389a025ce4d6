"""How Orbax is used: uncompressed, and what it needs to keep checkpoints in a bucket.

Orbax 0.12 keeps its small files by etils.epath (fsspec), and arrays by TensorStore, in gs:// too, but not in s3://
(google/orbax, issue 359), though TensorStore can: the three functions that turn a path into TensorStore's words know
gs:// and nothing else. They are taught s3:// here. Every process writes its own arrays straight into the bucket, and
reads only the ranges it needs.
"""

import functools
import importlib.metadata
import io
import logging
import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from typing import IO, Any

from orbax.checkpoint import v1 as ocp

from jaxlm.errors import UserError
from jaxlm.storage import remote


@contextmanager
def in_context(path: Any) -> Iterator[None]:
    """Inside, Orbax saves and loads as jaxlm wants it, at `path`, also a remote one. A save that begins inside may
    end outside.

    Raises:
      UserError: a package is missing, or Orbax has changed too much.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False  # zstd: a twelfth smaller, and five times as long (docs/lab-notes.md)
    if remote.is_remote(path):
        remote.file_system(str(path)[:2])  # or say which package is missing
        _teach_patience()
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE  # buckets cannot rename
        context.array.saving.use_ocdbt = False  # its list of contents is replaced on a condition: a lost answer ends the save
    if str(path).startswith("s3://"):
        _teach_s3()
    _teach_names()
    with context:
        yield


class Repeating:
    """fsspec's file systems as epath calls them; every call is repeated while its failure may pass."""

    def __getattr__(self, name: str) -> Callable:
        def call(path: str, *arguments: Any, **named: Any) -> Any:
            return remote.repeat(path, lambda files: getattr(files, name)(path, *arguments, **named))

        return call

    def open(self, path: str, mode: str) -> IO:
        file = Upload(path) if "w" in mode else remote.open_object(path)
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")


class Upload(io.BytesIO):
    """A small file that is written when it is closed."""

    def __init__(self, url: str):
        super().__init__()
        self.url = url

    def close(self) -> None:
        if not self.closed:
            remote.write(self.url, self.getvalue())
        super().close()


@functools.cache
def _teach_patience() -> None:
    """Once for each process: epath by itself repeats nothing, and gcsfs not everything."""
    from etils.epath.backend import fsspec_backend

    fsspec_backend.fs = lambda path, fs=fsspec_backend.fs: Repeating() if remote.is_remote(path) else fs(path)
    # Orbax says for each save that there are no OCDBT files to merge
    logging.getLogger("absl").addFilter(lambda record: "merge of OCDBT" not in record.getMessage())


@functools.cache
def _teach_names() -> None:
    """Once for each process: epath takes `[`, `*` and `?` in a folder's own name for a pattern, and a run directory
    called `exp[1]` would get checkpoints that nobody can read."""
    from etils import epath

    kind = type(epath.Path("/"))
    kind.glob = lambda self, pattern, glob=kind.glob: (  # on a copy of the path in which its own letters stand for themselves
        glob(self if remote.is_remote(self) else self._new(escape(str(self))), pattern))


@functools.cache
def _teach_s3() -> None:
    """Once for each process."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    try:
        use_driver, normalize = tensorstore_utils._use_gcs_driver, tensorstore_utils._normalize_path
        key_value_store = gcs_utils.get_kvstore_for_gcs
    except AttributeError as error:
        version = importlib.metadata.version("orbax-checkpoint")
        raise UserError(f"s3:// checkpoints need orbax-checkpoint 0.12, here is {version} ({error}); "
                        "pip install 'orbax-checkpoint==0.12.*', or use gs:// or a folder") from None

    def is_s3(path: str) -> bool:
        return path.startswith("s3://")

    tensorstore_utils._use_gcs_driver = lambda path: is_s3(path) or use_driver(path)
    tensorstore_utils._normalize_path = lambda path: f"s3:/{posixpath.normpath(path[4:])}" if is_s3(path) else normalize(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: s3_key_value_store(path) if is_s3(path) else key_value_store(path)


def s3_key_value_store(url: str) -> dict[str, Any]:
    """TensorStore's specification of a folder: endpoint, region and credentials as s3fs found them (it knows
    ~/.aws/config)."""
    client = _s3_client()
    endpoint, region = client.meta.endpoint_url, client.meta.region_name
    specification = {
        "driver": "s3", "bucket": remote.bucket_of(url), "path": url.partition("://")[2].partition("/")[2],
        "context": {"s3_request_retries": {"max_retries": remote.ATTEMPTS["s3"], "initial_delay": f"{remote.FIRST_WAIT}s",
                                           "max_delay": f"{remote.LONGEST_WAIT}s"}}}
    if not endpoint.rstrip("/").endswith(".amazonaws.com"):  # else TensorStore finds the bucket's region and endpoint itself
        specification |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        specification["aws_credentials"] = {"type": "environment"}  # else it complains on stderr where there is no ~/.aws
    return specification


def _s3_client() -> Any:
    files = remote.file_system("s3")
    files.connect()
    return files.s3
