"""Objects in s3:// and gs:// buckets, by fsspec. A call is repeated while its failure may pass, and fails in one
clear line.

Credentials, endpoint and region are the clients' own business (AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws, gcloud's, the
machine's role): none stands in a path or a config. Writing an object is atomic: it is there whole, or as it was.
"""

import errno
import io
import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.errors import RunError, UserError, without_secrets

Result = TypeVar("Result")

SCHEMES = ("s3", "gs")
ATTEMPTS = {"s3": 10, "gs": 4}  # at a call; gcsfs tries six times by itself, over half a minute, before it counts as one
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, at most: doubled each time; a random part of that is waited
PATIENCE = 5.0  # seconds before a user is told
READ_AHEAD = 8 * 2**20  # bytes
OPTIONS: dict[str, dict[str, Any]] = {  # listings are never remembered: other processes write, too
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}},  # they are repeated here
    "gs": {"use_listings_cache": False},
}
TRANSIENT_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted")
HOW_TO_SIGN_IN = {"s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role",
                  "gs": "`gcloud auth application-default login`, or the machine's service account"}


def is_remote(path: Any) -> bool:
    return str(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def check_url(url: str, key: str) -> None:
    """Raises UserError, naming `key`, where a path is meant to be remote and has no bucket: gs:///x, gs:/bucket."""
    if not is_remote(url) and (meant := re.match(r"(s3|gs|gcs):/+(.+)", url)):
        scheme = "gs" if meant[1] == "gcs" else meant[1]
        raise UserError(f"{key}={url}: expected {scheme}://BUCKET/FOLDER; did you mean '{scheme}://{meant[2]}'?")
    if is_remote(url) and not bucket_of(url):
        raise UserError(f"{key}={url}: expected {url[:2]}://BUCKET/FOLDER")


def bucket_of(url: Any) -> str:
    return str(url).partition("://")[2].partition("/")[0]


def file_system(scheme: str) -> Any:
    """fsspec's, made once for each process. Raises UserError when its package is not installed."""
    try:
        import fsspec
        import tenacity  # noqa: F401 (needed by every call)

        logger = logging.getLogger("gcsfs")  # it logs each failure with its traceback; here it is told in a line, once it matters
        logger.setLevel(logger.level or logging.CRITICAL)
        return fsspec.filesystem(scheme, **OPTIONS[scheme])
    except ImportError as error:
        raise UserError(f"{scheme}:// paths need more packages ({error}): pip install 'jaxlm[remote]'") from None


# ---- objects ---------------------------------------------------------------------------------------------------------

def read(url: Any, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes start .. stop of an object, fewer where it ends before. FileNotFoundError when it is not there."""
    if stop is not None and stop <= start:
        return b""
    return repeat(url, lambda files: files.cat_file(str(url), start=start or None, end=stop))


def write(url: Any, content: bytes) -> None:
    repeat(url, lambda files: files.pipe_file(str(url), content), writing=True)


def upload(file: Path, url: Any) -> None:
    """Copies a local file of any size."""
    repeat(url, lambda files: files.put_file(str(file), str(url)), writing=True)


def exists(url: Any) -> bool:
    """Whether there is an object, or a folder with something in it."""
    return repeat(url, lambda files: files.exists(str(url)))


def size(url: Any) -> int:
    """Bytes of an object. FileNotFoundError when it is not there."""
    return about(url)["size"]


def version(url: Any) -> str:
    """What changes whenever the object is written. FileNotFoundError when it is not there."""
    return version_in(about(url))


def version_in(entry: dict[str, Any]) -> str:
    return str(entry.get("generation") or entry.get("ETag"))


def modified(url: Any) -> float:
    """When an object was written, in seconds, by the store's clock. FileNotFoundError when it is not there."""
    return repeat(url, lambda files: files.modified(str(url)).timestamp())


def about(url: Any) -> dict[str, Any]:
    """The store's own words about an object: `size` and more. FileNotFoundError when it is not there."""
    entry = repeat(url, lambda files: files.info(str(url)))
    if entry["type"] == "directory":
        raise FileNotFoundError(errno.ENOENT, "a folder, not an object", str(url))
    return entry


def names(url: Any) -> list[str]:
    """What lies in a folder, sorted: objects, and folders of them. [] when there is nothing."""
    try:
        found = repeat(url, lambda files: files.ls(str(url), detail=False))
    except FileNotFoundError:
        return []
    return sorted({path.rstrip("/").rpartition("/")[2] for path in found} - {""})


def sizes_below(url: Any) -> dict[str, int]:
    """Bytes of every object below a folder, by its path from there, sorted."""
    return {name: size for name, (size, _) in objects_below(url).items()}


def objects_below(url: Any) -> dict[str, tuple[int, str]]:
    """Bytes and version of every object below a folder, by its path from there, sorted."""
    found = repeat(url, lambda files: files.find(str(url), detail=True))
    start = len(str(url).rstrip("/").partition("://")[2]) + 1
    return {path[start:]: (entry["size"], version_in(entry)) for path, entry in sorted(found.items())
            if path[start:] and not path.endswith("/")}


def objects_matching(pattern: str) -> dict[str, tuple[int, str]]:
    """Bytes and version of every object that matches a glob pattern, by its URL, sorted."""
    found = repeat(pattern, lambda files: files.glob(pattern, detail=True))
    return {f"{pattern[:2]}://{path}": (entry["size"], version_in(entry)) for path, entry in sorted(found.items())
            if entry["type"] != "directory"}


def delete_below(url: Any) -> None:
    """Deletes an object, or every object below a folder; there may be none."""
    try:
        repeat(url, lambda files: files.rm(str(url), recursive=True))
    except FileNotFoundError:
        return


def move(folder: Any, target: Any) -> None:
    """Gives another name to every object below a folder."""
    for name in sizes_below(folder):
        repeat(folder, lambda files, name=name: files.copy(f"{folder}/{name}", f"{target}/{name}"))
    delete_below(folder)


def check_bucket(url: Any, key: str) -> None:
    """Raises UserError, naming `key`, unless there is such a bucket, and what lies in it can be listed."""
    check_url(str(url), key)
    if not names(url) and not repeat(url, lambda files: files.exists(f"{str(url)[:2]}://{bucket_of(url)}")):
        raise no_bucket(url)


class Reader(io.RawIOBase):
    """An object as a file to read and to seek in. Every read is repeated like any other call."""

    def __init__(self, url: Any):
        super().__init__()
        self.url, self.size, self.position = url, size(url), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = read(self.url, self.position, min(self.position + len(buffer), self.size))
        buffer[:len(data)] = data
        self.position += len(data)
        return len(data)


def open_object(url: Any) -> io.BufferedReader:
    """An object to read from and to seek in. FileNotFoundError when it is not there."""
    return io.BufferedReader(Reader(url), READ_AHEAD)


# ---- failures --------------------------------------------------------------------------------------------------------

def repeat(url: Any, call: Callable[[Any], Result], writing: bool = False) -> Result:
    """`call(file system)`, again with growing pauses while it fails in a way that may pass.

    Raises:
      FileNotFoundError: there is no such object (where it is not to be written).
      UserError: no such bucket, no access, or nothing that the store understands.
      RunError: it failed every time.
    """
    scheme = str(url)[:2]
    files = file_system(scheme)
    import tenacity

    began = time.monotonic()
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: is_transient(error, scheme)), reraise=True,
        stop=tenacity.stop_after_attempt(ATTEMPTS[scheme]),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
        before_sleep=lambda state: _say(url, state))
    try:
        return attempts(call, files)
    except FileNotFoundError as error:
        if writing or code_of(error) == "NoSuchBucket":
            raise no_bucket(url) from None
        raise FileNotFoundError(errno.ENOENT, "no such object", without_secrets(str(url))) from None
    except (*connection_errors(scheme), *refusals(scheme)) as error:
        if is_denied(error, scheme):
            raise UserError(f"{url}: no access ({first_line(error)}); sign in: {HOW_TO_SIGN_IN[scheme]}") from None
        if is_transient(error, scheme):
            raise RunError(f"{url}: failed {ATTEMPTS[scheme]} times in {time.monotonic() - began:.0f} s ({first_line(error)}); "
                           "what has been written stays, start again when the store answers") from error
        raise UserError(f"{url}: {first_line(error)}") from error


def _say(url: Any, state: Any) -> None:
    """Once it takes long: single failures are everyday life."""
    if state.seconds_since_start > PATIENCE:
        said = f"{url}: failed {state.attempt_number} times ({first_line(state.outcome.exception())})"
        print(without_secrets(f"{said}; once more in {state.next_action.sleep:.0f} s"), file=sys.stderr)


def no_bucket(url: Any) -> UserError:
    return UserError(f"{url}: there is no bucket '{bucket_of(url)}'; expected one that exists")


def is_transient(error: BaseException, scheme: str) -> bool:
    """Whether the same call may succeed later: the server's own errors, too many requests, time-outs, broken
    connections."""
    status = status_of(error)
    if code_of(error) in TRANSIENT_CODES or isinstance(error, TimeoutError):
        return True
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)) or is_denied(error, scheme):
        return False
    return isinstance(error, connection_errors(scheme))


def is_denied(error: BaseException, scheme: str) -> bool:
    """Whether the store does not let these credentials in, or there are none."""
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return True
    if scheme == "s3":
        from botocore.exceptions import CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

        return isinstance(error, (CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, ProfileNotFound))
    return isinstance(error, OSError) and str(error).startswith("Forbidden")  # gcsfs


def connection_errors(scheme: str) -> tuple[type[Exception], ...]:
    """What the clients raise when the other side cannot be reached, or stops in the middle."""
    import aiohttp

    if scheme == "s3":
        from botocore.exceptions import ConnectionError, HTTPClientError, IncompleteReadError
        from botocore.parsers import ResponseParserError

        return OSError, EOFError, aiohttp.ClientError, ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError
    import requests
    from google.auth.exceptions import TransportError

    return OSError, EOFError, aiohttp.ClientError, requests.RequestException, TransportError


def refusals(scheme: str) -> tuple[type[Exception], ...]:
    """What the clients raise for all other answers."""
    if scheme == "s3":
        from botocore.exceptions import BotoCoreError, ClientError

        return BotoCoreError, ClientError
    from gcsfs.retry import ChecksumError, HttpError
    from google.auth.exceptions import GoogleAuthError

    return HttpError, ChecksumError, GoogleAuthError, ValueError


def status_of(error: BaseException) -> int | None:
    """The answer's HTTP status, if there was an answer."""
    for each in (error, error.__cause__):
        response, found = getattr(each, "response", None), getattr(each, "code", None)  # botocore's ClientError, gcsfs' HttpError
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(found, int | str) and str(found).isdecimal():
            return int(found)
    return None


def code_of(error: BaseException) -> str | None:
    """S3's own name for an error, such as SlowDown."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code")
    return None


def first_line(error: BaseException) -> str:
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return without_secrets(lines[0][:200]) if lines else type(error).__name__
