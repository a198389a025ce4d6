"""Buckets of real object servers that are made to fail at random: files, and a whole run."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from breaking import a_run_in_a_bucket_is_the_run_in_a_folder
from harness import write_workload
from object_servers import FailingProxy, failing_bucket

from jaxlm.data.sources import find_sources
from jaxlm.errors import RunError, UserError
from jaxlm.storage import remote
from jaxlm.storage.files import (
    as_path,
    delete,
    exists,
    move,
    names_in,
    open_bytes,
    read_bytes,
    read_range,
    sizes_below,
    version_of,
    write_atomically,
    write_bytes,
)


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request) -> Iterator[tuple[str, FailingProxy]]:
    with pytest.MonkeyPatch.context() as patch, failing_bucket(request.param) as (url, proxy):
        patch.setattr(remote, "FIRST_WAIT", 0.02)
        yield url, proxy


def test_files_are_whole_whatever_fails_on_the_way(bucket):
    url, proxy = bucket
    folder, content = as_path(url) / "files", os.urandom(100_000)
    proxy.fail(0.2, seed=1)
    for number in range(5):
        write_bytes(folder / f"{number}.txt", content)
    write_atomically(folder / "below" / "large.bin", lambda path: path.write_bytes(content * 50))
    before = version_of(folder / "0.txt")
    write_bytes(folder / "0.txt", b"other")
    assert version_of(folder / "0.txt") != before and read_bytes(folder / "0.txt") == b"other"
    assert read_range(folder / "1.txt", 10, 20) == content[10:20]
    assert read_range(folder / "1.txt", 99_990, 200_000) == content[-10:]
    with open_bytes(folder / "below" / "large.bin") as file:
        file.seek(-7, os.SEEK_END)
        assert file.read() == content[-7:]
    assert names_in(folder) == ["0.txt", "1.txt", "2.txt", "3.txt", "4.txt", "below"]
    assert [source.name for source in find_sources(f"{folder}/[12].txt")] == [f"{folder}/1.txt", f"{folder}/2.txt"]
    move(folder, as_path(url) / "moved")
    assert not exists(folder) and sizes_below(as_path(url) / "moved")["below/large.bin"] == len(content) * 50
    delete(as_path(url) / "moved")
    assert names_in(as_path(url) / "moved") == [] and proxy.failed() > 2
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "0.txt")


def test_a_bucket_that_is_not_there_is_bad_input(bucket):
    url, proxy = bucket
    proxy.fail(0)
    with pytest.raises(UserError, match="no bucket 'other'"):
        write_bytes(f"{url[:2]}://other/file", b"")
    with pytest.raises(UserError, match=r"run_dir=.*expected s3://BUCKET/FOLDER|run_dir=.*expected gs://BUCKET/FOLDER"):
        remote.check_url(f"{url[:2]}://", "run_dir")


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_what_is_repeated_shows_no_traceback(bucket):
    client = "logging.getLogger('gcsfs').error('out of retries', exc_info=OSError('reset'))"
    code = f"import logging; from jaxlm.storage import remote; remote.file_system('gs'); {client}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)  # gcsfs has pauses of its own, half a minute each time
def test_a_store_that_never_answers_ends_in_one_line(bucket):
    url, proxy = bucket
    proxy.fail(1, failures=("503", "reset"))
    with pytest.raises(RunError, match=r"failed 10 times in .* start again when the store answers"):
        read_bytes(f"{url}/file")
    proxy.fail(0)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_in_a_folder(tmp_path):
    """The long form has gs://, and other seeds."""
    run_file = write_workload(tmp_path, train__steps=16, checkpoint__every_steps=8, eval__every_steps=8)
    a_run_in_a_bucket_is_the_run_in_a_folder(run_file, tmp_path, "s3", seed=2)
