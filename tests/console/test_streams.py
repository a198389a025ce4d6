"""Standard streams that are closed, full, without a reader, or of another encoding (line 16): no JAX, one process
each."""

import os
import subprocess
import sys

import pytest

SAYS = """
from jaxlm.console.streams import steady
steady()
import os, sys
print("é日\\udcff", flush=True)
print("é", file=sys.stderr)
opened = os.open(os.devnull, os.O_RDONLY)
sys.exit(0 if opened > 2 else 9)
"""


def run(redirections="", **environment):
    command = f'"$0" -c "$1" {redirections}'
    return subprocess.run(["sh", "-c", command, sys.executable, SAYS], capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize(("encoding", "written"), [
    ("utf-8", "é日\\udcff".encode()), ("ascii", b"\\xe9\\u65e5\\udcff"), ("latin-1", b"\xe9\\u65e5\\udcff")])
def test_letters_that_an_encoding_lacks_are_written_as_escapes(encoding, written):
    done = run(PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stdout == written + b"\n", done.stderr


@pytest.mark.parametrize("redirections", ["<&- >&- 2>&-", ">&-", "2>&-", "2>/dev/full"])
def test_a_closed_or_full_stream_ends_nothing_and_no_file_takes_its_number(redirections):
    assert run(redirections).returncode == 0


def test_standard_output_that_is_full_is_named_once():
    done = run(">/dev/full")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == "OSError: [Errno 28] No space left on device: 'standard output'"
