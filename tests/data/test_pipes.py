"""Pipes are read once, whole, by one process (line 2); what can be read neither twice nor to its end is refused."""

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from jaxlm.data import pipes
from jaxlm.data.corpus import Corpus
from jaxlm.data.prepare import prepare
from jaxlm.data.sources import find_sources
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings

TEXT = "".join(f"line {number} of a text that is longer than any buffer\n" for number in range(3000))  # 150 kB
RUN = """
run_dir: run
data: {tokenizer: bytes, prepare_processes: 1, validation: 0}
devices: {platform: cpu}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def piped(text, name="fifo"):
    """A named pipe that gives this text once."""
    if not os.path.exists(name):
        os.mkfifo(name)

    def write():
        with suppress(BrokenPipeError), open(name, "w") as pipe:
            pipe.write(text)

    threading.Thread(target=write, daemon=True).start()


def settings(raw, **keys):
    return DataSettings(**{"raw": raw, "tokenizer": "bytes", "validation": 0, "prepare_processes": 1} | keys)


@pytest.mark.parametrize("document", ["file", "line"])
def test_all_bytes_of_a_pipe_arrive(folder, document):
    expected = prepare(settings("text.txt", document=document), "expected")
    piped(TEXT)
    corpus = prepare(settings("fifo", document=document), "corpus")
    assert corpus.digest == expected.digest and corpus.train.num_bytes >= len(TEXT) - 3000
    assert prepare(settings("fifo", document=document), "corpus").digest == expected.digest  # which nobody writes to now
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("command", ["data.raw=<(cat text.txt)", "data.raw=<(gzip -c text.txt)", "data.raw=/dev/stdin < text.txt",
                                     "data.raw=/dev/stdin < <(cat text.txt)"])
def test_as_a_shell_gives_it(folder, command):
    shell = f"{sys.executable} -m jaxlm prepare run.yaml {command}"
    done = subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Corpus("run/corpus").train.num_bytes == len(TEXT)


def test_the_number_of_the_shells_file_is_not_a_setting(folder):
    def through(descriptor):
        with open("text.txt") as file:
            cat = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
            os.dup2(cat.stdout.fileno(), descriptor)
            corpus = prepare(settings(f"/dev/fd/{descriptor}"), "corpus")
            os.close(descriptor)
            cat.stdout.close()
            cat.wait()
        return corpus.digest

    assert through(153) == through(154)


def test_a_killed_preparation_goes_on_with_what_it_has_read(folder, monkeypatch, capsys):
    """Nothing more comes through the pipe of a run that is started again: its copy is used. Another text starts
    anew."""
    expected = prepare(settings("text.txt"), "expected")
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.data.stages.write_shard", lambda task, stem: 1 / 0)
        piped(TEXT)
        with pytest.raises(ZeroDivisionError):
            prepare(settings("fifo"), "corpus")
    piped("")
    assert prepare(settings("fifo"), "corpus").digest == expected.digest
    assert f"going on with the {len(TEXT):,} bytes that were read before" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.data.stages.write_shard", lambda task, stem: 1 / 0)
        piped("another text")
        with pytest.raises(ZeroDivisionError):
            prepare(settings("fifo"), "second")
    piped(TEXT)
    assert prepare(settings("fifo"), "second").digest == expected.digest


def test_a_pipe_whose_beginning_was_lost_is_refused(folder, monkeypatch):
    monkeypatch.setattr(pipes, "CHUNK", 1000)
    original, seen = os.replace, []

    def killed(*arguments):
        seen.append(arguments)
        raise KeyboardInterrupt

    piped(TEXT)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings("fifo"), "corpus")
    monkeypatch.setattr(os, "replace", original)
    piped(TEXT)
    with pytest.raises(UserError, match=r"^fifo: a preparation was killed while it read this pipe, and the beginning is lost"):
        prepare(settings("fifo"), "corpus")
    assert seen and not (folder / "corpus").exists()


def test_an_empty_pipe_is_refused_and_leaves_nothing(folder):
    piped("")
    with pytest.raises(UserError, match=r"^fifo: nothing came through this pipe; expected text"):
        prepare(settings("fifo"), "runs/a/corpus")
    assert not (folder / "runs").exists()


def test_devices_and_sockets_are_refused(folder):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("door")
        for name, kind in (("/dev/zero", "a device"), ("/dev/null", "a device"), ("door", "a socket")):
            with pytest.raises(UserError, match=f"^data.raw: {name} is {kind}; expected a file, a folder or a pipe"):
                find_sources(name)
    with pytest.raises(UserError, match=r"^data\.validation: /dev/zero is a device"):
        prepare(settings("text.txt", validation="/dev/zero"), "corpus")


def test_a_pipe_for_validation_and_one_for_training(folder):
    os.mkfifo("held_out")
    piped("the validation text", "held_out")
    piped(TEXT)
    corpus = prepare(settings("fifo", validation="held_out"), "corpus")
    assert (corpus.train.num_bytes, corpus.validation.num_bytes) == (len(TEXT), len("the validation text"))
    assert [entry["path"] for entry in corpus.manifest["sources"]] == ["held_out", "fifo"]
