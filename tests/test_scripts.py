"""The launch scripts, without a cloud: what --dry-run prints, and what they do with a gcloud that only takes notes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
ALL = sorted(SCRIPTS.glob("*.sh")) + [SCRIPTS / "slurm.sbatch"]
POD = ["--name", "pod", "--zone", "us-east5-a", "--type", "v5p-64", "--spot"]
RUN = ["configs/gpt2_124m.yaml", "run_dir=/shared/run 1", "generate.prompts=[\"it's\"]"]


def call(script, *arguments, **environment):
    return subprocess.run(["bash", str(SCRIPTS / script), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=os.environ | environment)


def dry_run(script, *arguments, **environment):
    """The commands of a dry run, each as its list of words."""
    result = call(script, "--dry-run", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


def remote(commands):
    """The shell commands that a list of commands runs on the hosts."""
    return [words[words.index("--command") + 1] for words in commands if "--command" in words]


def test_create():
    request = ["gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id", "pod", "--zone", "us-east5-a"]
    assert dry_run("create.sh", *POD) == [
        [*request, "--accelerator-type", "v5p-64", "--runtime-version", "v2-alpha-tpuv5", "--spot"]]
    chosen = ["--name", "pod", "--zone", "us-east5-a", "--type", "v6e-8", "--project", "p", "--runtime", "mine"]
    assert dry_run("create.sh", *chosen) == [
        [*request, "--project", "p", "--accelerator-type", "v6e-8", "--runtime-version", "mine"]]


@pytest.mark.parametrize(("accelerator", "runtime"), [
    ("v6e-256", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v4-32", "tpu-ubuntu2204-base")])
def test_runtime_follows_the_accelerator(accelerator, runtime):
    (words,) = dry_run("create.sh", "--name", "pod", "--zone", "z", "--type", accelerator)
    assert words[words.index("--runtime-version") + 1] == runtime


@pytest.mark.parametrize(("given", "named"), [
    ("v5e-16", "v5litepod-16"), ("v5litepod-16", "v5litepod-16"), ("v5lite-4", "v5litepod-4"),
    ("V5P-64", "v5p-64"), ("v6e-8", "v6e-8")])
def test_a_type_takes_the_name_that_the_cloud_has_for_it(given, named):
    (words,) = dry_run("create.sh", "--name", "pod", "--zone", "z", "--type", given)
    assert words[words.index("--accelerator-type") + 1] == named
    assert "--runtime-version" in words
    described = dry_run("resume.sh", "--name", "pod", "--zone", "z", "--type", given, *RUN)[2]
    assert described[described.index("--accelerator-type") + 1] == named


def test_a_run_in_a_bucket_is_gone_on_with():
    commands = dry_run("run.sh", *POD, "gs://bucket/run", "train.steps=9")
    assert "jaxlm train gs://bucket/run train.steps=9 devices.platform=tpu --restart 10" in remote(commands)[-1]
    readme = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    assert "run_dir=gs://" in readme and "jaxlm[tpu,remote]" in readme and "v5e-16" in readme


def test_run_copies_installs_and_starts_detached_on_all_hosts():
    commands = dry_run("run.sh", *POD, "--setup", "sudo mount a:/b /shared", *RUN)
    assert all(words[words.index("--worker") + 1] == "all" for words in commands if words[0] == "gcloud")
    scp = [words for words in commands if "scp" in words]
    assert len(scp) == 1 and scp[0][6] == "pod:jaxlm.tar.gz"
    steps = remote(commands)
    assert steps[1] == "sudo mount a:/b /shared"
    assert any("uv pip install" in step and "'./jaxlm[tpu,remote]'" in step for step in steps)
    started = shlex.split(re.search(r"setsid nohup (.*?) </dev/null", steps[-1])[1])
    # every word arrives as it was given
    assert started == ["~/venv/bin/jaxlm", "train", *RUN, "devices.platform=tpu", "--restart", "10"]


def test_run_clones_a_repository():
    commands = dry_run("run.sh", *POD, "--repository", "https://host/jaxlm.git", "--revision", "v1", *RUN)
    assert not [words for words in commands if "scp" in words]
    assert "git clone https://host/jaxlm.git ~/jaxlm" in remote(commands)[1]
    assert remote(commands)[2] == "git -C ~/jaxlm checkout v1"


def test_the_start_command_runs_once(tmp_path):
    """Host side: the run is started with its log and pid, and a second start beside it is refused."""
    venv = tmp_path / "venv/bin"
    venv.mkdir(parents=True)
    (tmp_path / "jaxlm").mkdir()
    (venv / "jaxlm").write_text('#!/bin/sh\nprintf "%s|" "$@"\nexec sleep 60\n')
    (venv / "jaxlm").chmod(0o755)
    steps = remote(dry_run("run.sh", *POD, *RUN))
    check, start = steps[0], steps[-1]
    host = {"env": os.environ | {"HOME": str(tmp_path)}, "capture_output": True, "text": True}
    assert subprocess.run(["bash", "-c", check], **host).returncode == 0
    assert subprocess.run(["bash", "-c", start], **host).returncode == 0
    pid = int((tmp_path / "jaxlm.pid").read_text())
    try:
        again = subprocess.run(["bash", "-c", check], **host)
        assert again.returncode == 1 and "already" in again.stderr
        for _ in range(200):
            if (log := (tmp_path / "jaxlm.log").read_text()).count("|") == 5:
                break
            subprocess.run(["sleep", "0.05"], check=True)
        assert log == "|".join(["train", *RUN, "devices.platform=tpu", "--restart", "10"]) + "|"
    finally:
        os.kill(pid, 9)


def test_the_archive_holds_what_git_does_not_ignore(tmp_path):
    checkout = tmp_path / "check out"
    shutil.copytree(SCRIPTS, checkout / "tpu_scripts")
    (checkout / ".gitignore").write_text("runs/\n")
    (checkout / "configs").mkdir()
    (checkout / "configs/gpt2_124m.yaml").write_text("seed: 0\n")
    (checkout / "runs").mkdir()
    (checkout / "runs/big").write_text("x")
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    commands = dry_run(checkout / "tpu_scripts/run.sh", *POD, *RUN, TMPDIR=str(tmp_path))
    subprocess.run(next(words for words in commands if words[:2] == ["bash", "-c"]), check=True)
    names = subprocess.run(["tar", "tzf", str(tmp_path / "jaxlm-pod.tar.gz")], check=True, capture_output=True, text=True).stdout
    scripts = {f"tpu_scripts/{path.name}" for path in SCRIPTS.iterdir()}
    assert set(names.split()) == {".gitignore", "configs/gpt2_124m.yaml", *scripts}


def test_watch_and_delete():
    assert dry_run("watch.sh", *POD, "--worker", "3") == [[
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "us-east5-a", "--worker", "3",
        "--command", "tail -n 100 -F ~/jaxlm.log"]]
    assert dry_run("delete.sh", *POD) == [[
        "gcloud", "compute", "tpus", "queued-resources", "delete", "pod", "--zone", "us-east5-a", "--force", "--quiet"]]


def test_resume_dry_run_shows_every_step():
    commands = dry_run("resume.sh", *POD, *RUN)
    assert [words[4] for words in commands[:3]] == ["describe", "delete", "create"]
    assert commands[3:] == dry_run("run.sh", *POD, *RUN)


@pytest.mark.parametrize(("state", "expected"), [
    ("ACTIVE", []), ("SUSPENDED", ["delete", "create"]), ("GONE", ["create"]), ("WAITING_FOR_RESOURCES", [])])
def test_resume_makes_a_lost_tpu_again(tmp_path, state, expected):
    gcloud = tmp_path / "bin/gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text('''#!/bin/sh
echo "$4" >>"$NOTES"
case $4 in
  describe)
    cat "$STATE"
    if grep -q WAITING "$STATE"; then echo ACTIVE >"$STATE"; fi
    if grep -q GONE "$STATE"; then echo 'ERROR: NOT_FOUND: Resource was not found' >&2 && exit 1; fi ;;
  create) echo ACTIVE >"$STATE" ;;
  delete) echo GONE >"$STATE" ;;
  *) : ;;
esac
''')
    gcloud.chmod(0o755)
    (tmp_path / "state").write_text(state)
    result = call("resume.sh", *POD, "--repository", "url", *RUN, PATH=f"{gcloud.parent}:{os.environ['PATH']}",
                  NOTES=str(tmp_path / "notes"), STATE=str(tmp_path / "state"))
    assert result.returncode == 0, result.stderr
    notes = [note for note in (tmp_path / "notes").read_text().split() if note != "describe"]
    assert notes[: len(expected)] == expected
    assert set(notes[len(expected):]) == {"ssh"}


def test_where_gcloud_cannot_tell_nothing_is_made(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\necho "$4" >>"$NOTES"\necho "ERROR: no project" >&2\nexit 1\n')
    gcloud.chmod(0o755)
    for script in ("resume.sh", "create.sh"):
        result = call(script, *POD, *RUN, PATH=f"{tmp_path}:{os.environ['PATH']}", NOTES=str(tmp_path / "notes"))
        assert result.returncode == 1 and "no project" in result.stderr
    assert (tmp_path / "notes").read_text().split() == ["describe", "describe"]


def test_slurm_starts_one_process_per_gpu():
    assert dry_run("slurm.sbatch", *RUN) == [
        ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=8", "jaxlm", "train", *RUN, "--restart", "10"]]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", (SCRIPTS / "slurm.sbatch").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # jax.distributed gives a Slurm task one GPU


@pytest.mark.parametrize(("script", "arguments", "message"), [
    ("create.sh", ["--name", "pod", "--zone", "z"], "--type is needed"),
    ("create.sh", ["--name", "pod", "--zone", "z", "--type", "v9-8"], "no default --runtime"),
    ("delete.sh", ["--zone", "z"], "--name is needed"),
    ("watch.sh", ["--name", "pod"], "--zone is needed"),
    ("watch.sh", ["--nam", "pod"], "unknown option --nam"),
    ("watch.sh", ["--name"], "--name needs a value"),
    ("run.sh", ["--name", "pod", "--zone", "z"], "config file is needed"),
    ("run.sh", ["--name", "pod", "--zone", "z", "no.yaml"], "no.yaml: no such file"),
    ("slurm.sbatch", [], "config file is needed"),
])
def test_bad_arguments_are_named(script, arguments, message):
    result = call(script, *arguments)
    assert result.returncode == 2 and message in result.stderr and result.stdout == ""


@pytest.mark.parametrize("script", [path for path in ALL if path.name != "common.sh"], ids=lambda path: path.name)
def test_help_tells_the_usage(script):
    result = call(script, "--help")
    assert result.returncode == 0 and "Usage: " in result.stdout and "shellcheck" not in result.stdout


@pytest.mark.parametrize("script", ALL, ids=lambda path: path.name)
def test_syntax(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert shellcheck, "shellcheck is not installed: pip install -e '.[test]'"
    result = subprocess.run([shellcheck, "-x", "-P", str(SCRIPTS), *map(str, ALL)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
