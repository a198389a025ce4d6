"""Attacks: text, corpora, tokenizers, checkpoints and run directories from others run no code and reach no other
file."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet

from jaxlm import cli, config
from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.checkpoints.manifest import commit, digest_files
from jaxlm.data.corpus import Corpus, offsets_file
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.errors import UserError
from jaxlm.models.model import Model
from jaxlm.parallel.mesh import make_mesh
from jaxlm.runtime import executables, processes
from jaxlm.runtime.compiler import programs_folder
from jaxlm.settings import DevicesSettings, MeshSettings
from jaxlm.storage.files import sizes_below
from jaxlm.training.step import from_saved, make_trainer

RUN = {
    "model": {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "max_length": 32},
    "data": {"raw": "text.txt", "document": "line", "tokenizer": "characters", "validation": 0.2, "sequence_length": 16,
             "prepare_processes": 1},
    "train": {"steps": 2}, "logging": {"tensorboard": False}, "generate": {"max_new_tokens": 2},
    "devices": {"platform": "cpu", "count": 1, "compiled": None},
}


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def bomb(tmp_path):
    """The pickle; the test fails if anybody has unpickled it."""
    content = pickle.dumps(Bomb(tmp_path / "exploded"))
    pickle.loads(content)
    (tmp_path / "exploded").rmdir()  # it works
    yield content
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a text, a run file and a finished run."""
    folder, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    (folder / "text.txt").write_text("".join(f"the line number {number} of a text\n" for number in range(80)))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "initialize", lambda settings: jax.devices()[: settings.count or 1])
        assert cli.main(["train", "run.yaml", "run_dir=run"]) == 0
    os.chdir(before)
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be attacked; the current directory."""
    shutil.copytree(finished, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(processes, "initialize", lambda settings: jax.devices()[: settings.count or 1])
    return tmp_path / "here"


@pytest.fixture
def refused(capfd):
    """`refused("train", ...)`: the last line on stderr of a command that ends with code 2."""
    def run(*arguments: str) -> str:
        capfd.readouterr()
        code = cli.main(list(map(str, arguments)))
        lines = capfd.readouterr().err.splitlines()
        assert code == 2 and "Traceback" not in "".join(lines), lines
        return lines[-1]

    return run


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------- nothing is unpickled

def test_no_file_of_a_checkpoint_is_unpickled(here, bomb):
    settings = config.load(here / "run")
    trainer = make_trainer(Model(settings.model, settings.train), settings, make_mesh(MeshSettings(), jax.devices()[:1]))
    folder = here / "run" / "checkpoints" / "2"
    body = {name: value for name, value in json.loads((folder / "manifest.json").read_bytes()).items()
            if name not in ("files", "digest")}
    names = [name for name in sizes_below(folder) if name != "manifest.json"]
    assert len(names) > 5
    refusals = 0
    for name in names:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        commit(folder, body, digest_files(folder, names), 0)  # a careful attacker: the digests are right
        with Checkpoints(here / "run") as checkpoints:
            assert checkpoints.choose(None) == 2
            try:
                from_saved(checkpoints.restore(2, trainer.saved))
            except UserError:
                refusals += 1
        (folder / name).write_bytes(whole)
    assert refusals > 2


@pytest.mark.parametrize("which", ["tokens", "offsets", "crc32"])
def test_no_array_of_a_corpus_is_unpickled(here, bomb, tmp_path, which):
    """An object array's file is a header and a pickle."""
    corpus = here / "run" / "corpus"
    names = {"tokens": "train-00000.tokens.npy", "offsets": offsets_file("train"), "crc32": "train-00000.crc32.npy"}
    path, length = corpus / names[which], len(np.load(corpus / names[which]))
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (length,)})
        file.write(bomb.ljust(8 * length, b"\0"))

    def vouch(manifest):
        manifest["token_dtype"] = "|O"
        entry = manifest["splits"]["train"]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entry["offsets" if which == "offsets" else "shards"] = (
            entry["offsets"] | {"sha256": digest} if which == "offsets" else
            [entry["shards"][0] | ({"sha256": digest} if which == "tokens" else
                                   {"checksums": {"file": path.name, "sha256": digest}})])

    edit(corpus / "manifest.json", vouch)
    with pytest.raises(UserError, match="damaged"):
        Corpus(corpus)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "jaxlm_tokenizer.json", "characters.json"])
def test_no_tokenizer_is_unpickled(tmp_path, bomb, name):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / name).write_bytes(bomb)
    if name == "characters.json":
        special = dict.fromkeys(("pad", "unk", "bos", "eos", "cls", "sep", "mask"))
        (folder / "jaxlm_tokenizer.json").write_text(
            json.dumps({"kind": "characters", "digest": "", "special": special, "files": [name]}))
    with pytest.raises(UserError):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.jsonl.gz", "x.parquet.gz", "x.txt.zst", "x.txt"])
def test_no_text_is_unpickled(here, bomb, refused, name):
    (here / name).write_bytes(bomb)
    refused("prepare", "run.yaml", f"data.raw={name}", "data.corpus=new")


def test_parquet_cannot_bring_types_that_are_code(here, bomb):
    """Arrow once unpickled this type's metadata (CVE-2023-47248)."""
    field = pyarrow.field("text", pyarrow.string(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb})
    with parquet.ParquetWriter("x.parquet", pyarrow.schema([field])) as writer:
        writer.write_table(pyarrow.table([pyarrow.array(["one text", "another text"] * 50)], schema=pyarrow.schema([field])))
    assert cli.main(["prepare", "run.yaml", "data.raw=x.parquet", "data.corpus=new"]) in (0, 2)


def test_yaml_cannot_name_python_objects(here, tmp_path, refused):
    tag = f"seed: !!python/object/apply:os.mkdir [{tmp_path / 'exploded'}]\n"
    for path in (here / "run.yaml", here / "run" / "config.yaml"):
        path.write_text(tag)
    assert "not valid YAML" in refused("train", "run.yaml")
    assert "not valid YAML" in refused("generate", "run")
    refused("report", "run")
    refused("prepare", "run.yaml", tag.replace("seed: ", "seed=").strip())
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------------------------- compiled programs

@pytest.fixture
def program(meshes, tmp_path, bomb):
    """(lowered, mesh, folder) of a program whose file holds the bomb, with the right digest in front."""
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), np.float32))
    folder = programs_folder(DevicesSettings(compiled=str(tmp_path / "compiled")))
    path = executables.save(lowered.compile(), lowered, meshes["one"], folder)
    assert folder.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(hashlib.sha256(bomb).digest() + bomb)
    return lowered, meshes["one"], folder


def test_programs_that_others_could_have_written_are_not_loaded(program, monkeypatch):
    lowered, mesh, folder = program
    path = next(folder.iterdir())
    path.chmod(0o620)
    with pytest.raises(UserError, match="others can write"):
        executables.load(lowered, mesh, folder)
    for mode in (0o720, 0o702, 0o1777):
        folder.chmod(mode)
        with pytest.raises(UserError, match="chmod go-w"):
            programs_folder(DevicesSettings(compiled=str(folder)))
    folder.chmod(0o700)
    (folder.parent / "open").mkdir()
    (folder.parent / "open").chmod(0o777)
    with pytest.raises(UserError, match="anyone can replace"):
        programs_folder(DevicesSettings(compiled=str(folder.parent / "open" / "mine")))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        programs_folder(DevicesSettings(compiled=str(folder)))


def test_a_run_directory_does_not_say_where_programs_are(here):
    path = here / "run" / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    saved["devices"]["compiled"] = str(here / "run" / "compiled")  # sent along with the run
    path.write_text(yaml.safe_dump(saved))
    assert config.load("run").devices.compiled == DevicesSettings().compiled
    assert config.load("run", ["devices.compiled=mine"]).devices.compiled == "mine"
    saved["devices"]["compiled"] = None
    path.write_text(yaml.safe_dump(saved))
    assert config.load("run").devices.compiled is None


# ---------------------------------------------------------------------------------------------------------------- paths

@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "crc32"])
def test_a_corpus_cannot_name_files_outside(here, absolute, kind):
    corpus = here / "run" / "corpus"
    outside = here / f"train-00000.{kind}.npy"
    shutil.copy(corpus / outside.name, outside)  # as good as the real one

    def point_outside(manifest):
        shard = manifest["splits"]["train"]["shards"][0]
        (shard if kind == "tokens" else shard["checksums"])["file"] = str(outside) if absolute else f"../../{outside.name}"

    edit(corpus / "manifest.json", point_outside)
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(names a file '.*', expected train-00000"):
        Corpus(corpus)


def test_a_tokenizer_cannot_name_files_outside(here):
    secret = here / "secret.json"
    secret.write_text('"abc"')
    folder = here / "run" / "corpus" / "tokenizer"
    for name in ("../../../secret.json", str(secret)):
        edit(folder / "jaxlm_tokenizer.json", lambda content, name=name: content.update(files=["characters.json", name]))
        with pytest.raises(UserError, match=r"a file named '.*secret\.json'"):
            load_tokenizer(folder)
        with pytest.raises(UserError, match=r"a file named '.*secret\.json'"):  # as in a checkpoint
            Tokenizer.from_dict({"kind": "characters", "special": {}, "files": {"characters.json": '"ab"', name: "{}"}})


def test_a_checkpoint_cannot_name_files_outside(here, refused):
    folder = here / "run" / "checkpoints" / "2"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    body = {name: value for name, value in manifest.items() if name not in ("files", "digest")}
    (folder / "link").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo")
    for name in ("../../../text.txt", str(here / "text.txt"), "/dev/zero", "link", "fifo"):
        found = here / "text.txt"
        entry = [found.stat().st_size, hashlib.sha256(found.read_bytes()).hexdigest()]
        commit(folder, body, manifest["files"] | {name: entry}, 0)
        assert f"'{name}' is no file of this folder" in refused("generate", "run")


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "checkpoints", "checkpoints/4", "corpus.partial", "hangs"])
def test_a_run_directory_cannot_lead_writes_elsewhere(here, refused, name):
    precious = here / "precious"
    (precious / "7").mkdir(parents=True)
    (precious / "7" / "work").write_text("of years")
    link = here / "run" / name
    if link.is_dir():
        link.rename(here / "moved")
    link.unlink(missing_ok=True)
    link.symlink_to(precious / "7" / "work" if name in ("metrics.jsonl", ".lock") else precious)
    assert f"{name} is a link" in refused("train", "run", "train.steps=4")
    assert (precious / "7" / "work").read_text() == "of years" and len(list(precious.rglob("*"))) == 2


def test_a_preparation_does_not_tidy_up_behind_a_link(here, refused):
    (here / "precious" / "7").mkdir(parents=True)
    (here / "new.partial").symlink_to(here / "precious")
    assert "new.partial is a link" in refused("prepare", "run.yaml", "data.corpus=new")
    assert (here / "precious" / "7").is_dir()


def test_links_inside_a_run_directory_are_fine(here):
    (here / "run" / "newest").symlink_to("checkpoints/2")
    assert cli.main(["train", "run", "train.steps=3"]) == 0


# -------------------------------------------------------------------------------------------------------------- secrets

@pytest.mark.parametrize("override", [
    "data.raw=https://someone:hunter2@host/text.txt", "data.raw=[text.txt, 'https://hunter2@host/text.txt']",
    "run_dir=s3://AKIA:hun/ter+hunter2@bucket/run", "data.corpus={'s3://key:hunter2@bucket/corpus': 1.0}",
    "data.tokenizer=https://host/t.json?X-Amz-Signature=hunter2", "data.validation=gs://bucket/v?a=1&access_token=hunter2",
    "devices.compiled=gs://key:hunter2@bucket/programs"])
def test_a_config_with_a_secret_in_a_url_is_refused_without_repeating_it(here, refused, override):
    line = refused("train", "run.yaml", "run_dir=new", override)
    assert line.startswith(f"jaxlm: {override.partition('=')[0]}: a URL with a password, key or token in it")
    assert "hunter2" not in line and not (here / "new").exists()
    name, _, value = override.partition("=")
    values = yaml.safe_load((here / "run.yaml").read_text())
    section, _, key = name.rpartition(".")
    (values.setdefault(section, {}) if section else values)[key] = yaml.safe_load(value)
    (here / "run.yaml").write_text(yaml.safe_dump(values))
    line = refused("train", "run.yaml")
    assert line.startswith("jaxlm: run.yaml:") and "hunter2" not in line


def test_places_without_secrets_and_prompts_are_taken(here):
    settings = config.load("run.yaml", ["data.corpus=s3://bucket/corpus@2", "run_dir=gs://bucket:9000/runs@home/1",
                                        "generate.prompts=['see https://me:you@host']"])
    assert settings.data.corpus == "s3://bucket/corpus@2"


def test_a_message_repeats_no_secret_and_no_terminal_codes(here, refused):
    assert "https://***@host/run.yaml" in refused("train", "https://someone:hunter2@host/run.yaml")
    assert "https://***@host" in refused("train", "run.yaml", "https://someone:hunter2@host/run.yaml")
    assert "hunter2" not in refused("train", "run.yaml", "data.rw=https://someone:hunter2@host/run.yaml")
    (here / "bad.jsonl").write_text(json.dumps({"\x1b]0;owned\x07\x1b[2J": "text"}) + "\n")
    line = refused("prepare", "run.yaml", "data.raw=bad.jsonl", "data.corpus=new")
    assert line.isprintable() and "\\x1b[2J" in line


@pytest.mark.parametrize("url", ["https://token@github.com/us/jaxlm", "https://me:token@github.com/us/jaxlm"])
def test_the_launch_script_puts_no_password_on_the_hosts(url):
    script = Path(__file__).parents[1] / "tpu_scripts" / "run.sh"
    done = subprocess.run(["bash", str(script), "--name", "pod", "--zone", "z", "--repository", url, "--dry-run", "x.yaml"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "token@" not in done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------------- sockets

def listening(pid: int) -> set[str]:
    """Addresses at which a process listens (Linux), as in /proc/net/tcp and tcp6 without the port."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor))
        except OSError:
            continue
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(local.partition(":")[0])
    return addresses


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def under_its_networks_name() -> list[str]:
    """Starts a command where this host's name stands for its address in the network, as in a cluster; [] where that
    cannot be."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return []
        address = probe.getsockname()[0]
    command = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', address]
    try:
        return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else []
    except FileNotFoundError:
        return []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_processes_of_one_machine_listen_on_localhost_only(here):
    command = [*under_its_networks_name(), sys.executable, "-m", "jaxlm", "train", "run.yaml", "run_dir=several",
               "data.corpus=run/corpus", "train.steps=100000", "--processes", "2"]
    with open(here / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline, found = time.monotonic() + 120, {}
        while time.monotonic() < deadline and process.poll() is None:
            found |= {pid: listening(pid) for pid in children(process.pid)}
            if (here / "several" / "metrics.jsonl").exists() and (here / "several" / "metrics.jsonl").stat().st_size:
                break
            time.sleep(0.2)
        assert process.poll() is None, (here / "log").read_text()
        found = {pid: listening(pid) for pid in children(process.pid)}
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the others end with it
        process.wait()
    assert len(found) == 2 and all(found.values()), found  # Gloo in both, the coordinator in one
    localhost = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set().union(*found.values()) <= localhost, found
