"""One fault each, in a real run: what has to happen, and how long it took."""

import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import run

import numpy as np
from harness import (
    INTERVAL,
    PATIENCE,
    Started,
    arguments_of,
    copied,
    differences,
    half_written,
    kill,
    last_step,
    newest,
    recorded,
    rows,
)
from object_servers import failing_bucket

from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.checkpoints.manifest import finished_steps
from jaxlm.errors import UserError
from jaxlm.reporting.metrics import read_metrics
from jaxlm.storage.files import read_bytes, sizes_below, write_bytes

NO_TRACEBACK = "Traceback (most recent call last)"


def one_line(started: Started, *words: str) -> str:
    """The line that `jaxlm` ended with, which has these words in it; nothing else was thrown at the user."""
    text = started.text()
    assert NO_TRACEBACK not in text, text[-3000:]
    lines = [line for line in text.splitlines() if line.startswith("jaxlm: ")]
    assert lines and all(re.search(word, lines[-1]) for word in words), (words, lines[-1:], text[-1000:])
    return lines[-1]


# ---- numbers ---------------------------------------------------------------------------------------------------------

def bad_steps_are_skipped(run_file: Path, folder: Path, kind: str, layout: str = "1x2") -> str:
    """Two bad steps among good ones: skipped and counted; all others go on with finite numbers."""
    steps, run_dir = [31, 33], folder / f"bad_{kind}"
    started = Started(arguments_of(run_file, run_dir, layout, "train.steps=40"), folder / f"bad_{kind}.log",
                      {"nan": kind, "steps": steps})
    assert started.wait() == 0, started.text()[-3000:]
    counts = {row["step"]: row.get("skipped_steps", 0) for row in rows(run_dir) if "loss" in row}
    assert [counts[step] for step in (30, 31, 32, 33, 40)] == [0, 1, 1, 2, 2], counts
    values = [row["val_loss"] for row in rows(run_dir) if "val_loss" in row]
    assert values and np.isfinite(values).all()
    return f"{kind}: 2 of 2 bad steps skipped, validation loss {values[-1]:.3f}"


def a_spike_is_skipped(run_file: Path, folder: Path) -> str:
    run_dir = folder / "spike"
    started = Started(arguments_of(run_file, run_dir, "1x2", "train.steps=60", "guards.spike_sigma=6"), folder / "spike.log",
                      {"spike": 50, "steps": [50]})
    assert started.wait() == 0, started.text()[-3000:]
    counts = {row["step"]: row.get("skipped_steps", 0) for row in rows(run_dir) if "loss" in row}
    assert (counts[49], counts[50], counts[60]) == (0, 1, 1), counts
    return "the step of a 50-fold loss skipped (6 sigma), no other"


def repeatable_faults_are_told_from_transient_ones(run_file: Path, folder: Path, transient: bool) -> str:
    name = "transient" if transient else "repeatable"
    run_dir = folder / name
    started = Started(arguments_of(run_file, run_dir, "1x2", "guards.most_skipped=3", "--restart", "2"), folder / f"{name}.log",
                      {"nan": "loss", "steps": list(range(25, 200)), "transient": transient})
    code = started.wait()
    if transient:
        assert code == 1, started.text()[-3000:]
        return one_line(started, "a transient fault", r"\d+ steps in a row were skipped")
    assert code == 3, started.text()[-3000:]
    assert started.text().count("starting again") == 0  # it would only come again
    line = one_line(started, "the same when run once more", "step 29", "examples")
    assert len((run_dir / "diagnosis-29.json").read_text().splitlines()) == 16
    return line


def a_wrong_copy_is_named(run_file: Path, folder: Path) -> str:
    """A bit of a parameter turned on one of the devices that hold it."""
    run_dir = folder / "copies"
    started = Started(arguments_of(run_file, run_dir, "1x4", "guards.compare_every_steps=5", "mesh.data=4", "mesh.fsdp=1"),
                      folder / "copies.log", {"corrupt": 2, "steps": [15]})
    assert started.wait() == 1, started.text()[-3000:]
    assert last_step(run_dir) == 15
    return one_line(started, "step 15: copies of the parameters differ", r"device 2 \(cpu, process 0\): token_embedding")


# ---- processes -------------------------------------------------------------------------------------------------------

def a_stuck_process_is_named(run_file: Path, folder: Path, phase: str) -> str:
    """SIGSTOP in one of two processes; the other names it, writes its stacks, and the supervisor starts them again."""
    run_dir, log = folder / f"stuck_{phase}", folder / f"stuck_{phase}.log"
    limits = ["guards.step_seconds=8", "guards.save_seconds=8", "guards.start_seconds=25"]
    started = Started(arguments_of(run_file, run_dir, "2x2", *limits, "--restart", "3"), log)
    if phase == "start-up":
        started.wait_for(lambda: len(started.workers()) == 2)
        time.sleep(1)  # a process that is stopped before it is Python would stop the launcher, which waits for that
    else:
        started.wait_for(lambda: last_step(run_dir) > 3 and (phase == "step" or half_written(run_dir)))
    stuck, since = started.workers()[1], time.monotonic()
    kill(stuck, signal.SIGSTOP)
    started.wait_for(lambda: "starting again" in started.text())
    noticed = time.monotonic() - since
    assert started.wait() == 0, started.text()[-3000:]
    [line] = [line for line in started.text().splitlines() if "HUNG" in line]
    assert "process 1" in line and ("no sign of life" in line or "has not come" in line), line
    [stacks] = (run_dir / "hangs").glob("00000-*.txt")
    assert "most recent call first" in stacks.read_text()
    return f"stuck in {phase}: noticed and ended after {noticed:.1f} s; {line}"


def a_slow_process_is_only_slow(run_file: Path, folder: Path) -> str:
    run_dir = folder / "slow"
    started = Started(arguments_of(run_file, run_dir, "2x2", "guards.step_seconds=20", "train.steps=20"), folder / "slow.log",
                      {"slow": 0.5, "process": 1})
    assert started.wait() == 0, started.text()[-3000:]
    seconds = [row["step_seconds"] for row in read_metrics(run_dir) if "loss" in row][2:]
    return f"one process 0.5 s slower each step: the run takes {np.median(seconds):.2f} s a step, and ends"


def told_twice_it_ends_at_once(run_file: Path, folder: Path) -> str:
    """While one of two processes is stuck, so that there is no orderly end."""
    run_dir = folder / "twice"
    started = Started(arguments_of(run_file, run_dir, "2x2"), folder / "twice.log")
    started.wait_for(lambda: last_step(run_dir) > 3)
    workers = started.workers()
    kill(workers[1], signal.SIGSTOP)
    kill(started.process.pid, signal.SIGTERM)
    time.sleep(1)
    assert started.process.poll() is None
    since = time.monotonic()
    kill(started.process.pid, signal.SIGTERM)
    assert started.wait() == 143, started.ending()
    started.end()
    return f"second SIGTERM: ended after {time.monotonic() - since:.1f} s, exit code 143"


# ---- disks -----------------------------------------------------------------------------------------------------------

@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own (needs root)."""
    folder.mkdir(parents=True)
    run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        run(["umount", "--lazy", str(folder)], check=True)


def a_full_disk_is_one_line(run_file: Path, folder: Path) -> str:
    """The disk fills up during the run: one clear error, and the last good checkpoint serves once there is room."""
    began = time.monotonic()
    with small_disk(folder / "full", "24m") as disk:
        run_dir, log = disk / "run", folder / "full.log"
        arguments = arguments_of(run_file, run_dir, "1x2", f"data.corpus={folder / 'full_corpus'}", "checkpoint.keep_last=1")
        started = Started(arguments, log)
        started.wait_for(lambda: newest(run_dir) >= INTERVAL)
        filler = disk / "filler"
        with suppress(OSError), open(filler, "wb") as file:  # until there is no space left
            while True:
                file.write(bytes(2**16))
                file.flush()
        assert started.wait() == 1, started.text()[-3000:]
        line = f"{time.monotonic() - began:.0f} s from start to end: {one_line(started, 'No space left|cannot be saved')}"
        saved = newest(run_dir)
        assert saved >= INTERVAL
        filler.unlink()
        since = time.monotonic()
        again = Started(arguments, log)
        assert again.wait() == 0, again.text()[-3000:]
        assert f"resuming from step {saved}" in again.text()
        return f"{line}; with room again it went on from step {saved} and ended after {time.monotonic() - since:.1f} s"


def a_lost_permission_is_one_line(run_file: Path, folder: Path) -> str:
    """The folder of checkpoints takes no more files during the run, not even from root (chattr +i)."""
    run_dir, log = folder / "forbidden", folder / "forbidden.log"
    started = Started(arguments_of(run_file, run_dir, "1x2", "train.steps=100000"), log)
    started.wait_for(lambda: newest(run_dir) >= INTERVAL)
    run(["chattr", "+i", str(run_dir / "checkpoints")], check=True)
    try:
        code = started.wait()
        saved = newest(run_dir)
    finally:
        run(["chattr", "-i", str(run_dir / "checkpoints")], check=True)
    assert code == 1 and saved >= INTERVAL, started.text()[-3000:]
    line = one_line(started, "cannot be saved", "Operation not permitted|Permission denied", f"step {saved} is the last")
    again = Started(arguments_of(run_file, run_dir, "1x2", f"train.steps={saved + 5}"), log)
    assert again.wait() == 0 and f"resuming from step {saved}" in again.text(), again.text()[-3000:]
    return f"{line}; with the permission back it went on from step {saved}"


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def damaged_checkpoints_are_noticed(run_dir: Path, folder: Path, draw: random.Random, count: int) -> list[str]:
    """A bit turned, or the end cut off, in a random file of the newest checkpoint, each file at least once: each
    time the one before is chosen, and the file is named."""
    steps = finished_steps(run_dir)
    newest_folder = run_dir / "checkpoints" / str(steps[-1])
    files = sorted(path.relative_to(run_dir) for path in newest_folder.rglob("*") if path.is_file() and path.stat().st_size)
    told = []
    for number in range(count):
        broken = copied(run_dir, folder / "broken")
        file = broken / (files[number % len(files)] if number < len(files) else draw.choice(files))
        content = bytearray(file.read_bytes())
        if draw.random() < 0.5:
            place = draw.randrange(len(content))
            content[place] ^= 1 << draw.randrange(8)
        else:
            content = content[: draw.randrange(len(content))]
        file.write_bytes(content)
        with Checkpoints(broken) as checkpoints:
            assert checkpoints.choose(None) == steps[-2], file
            try:
                checkpoints.choose(steps[-1])
            except UserError as error:
                told.append(str(error))
                assert str(file) in told[-1], (file, told[-1])
            else:
                raise AssertionError(f"{file}: loaded silently")
    shutil.rmtree(folder / "broken")
    return told


# ---- elastic ---------------------------------------------------------------------------------------------------------

def every_mesh_sees_the_same_examples(run_file: Path, folder: Path, parts: list[tuple[int, int]]) -> str:
    """A run that goes on with other (processes, devices of each) after each part: every row of every step is the
    undisturbed run's, once."""
    steps, seen, losses = 12, {}, {}
    for name, sequence in (("undisturbed", [(1, 8)]), ("elastic", parts)):
        run_dir, record = folder / f"{name}_{len(parts)}", folder / f"{name}_{len(parts)}_rows"
        record.mkdir()
        for number, (processes, devices) in enumerate(sequence, start=1):
            until = steps * number // len(sequence)
            started = Started(
                ["train", str(run_file), f"run_dir={run_dir}", f"devices.count={devices}", "--processes", str(processes),
                 "mesh.data=4", "mesh.fsdp=2", "mesh.elastic=true", f"train.steps={until}", "checkpoint.every_steps=1000"],
                folder / f"{name}_{len(parts)}.log", {"record": str(record)})
            assert started.wait() == 0, started.text()[-3000:]
        seen[name] = list(recorded(record))
        losses[name] = [row["loss"] for row in rows(run_dir) if "loss" in row]
    assert len(seen["elastic"]) == 16 * steps and seen["elastic"] == seen["undisturbed"]
    deviation = max(abs(mine / theirs - 1) for mine, theirs in zip(losses["elastic"], losses["undisturbed"], strict=True))
    assert deviation < 1e-5, deviation
    return (" -> ".join(f"{processes} x {devices}" for processes, devices in parts)
            + f" (processes x devices): {16 * steps} rows of {steps} steps the same; losses within {deviation:.1e}")


# ---- storage ---------------------------------------------------------------------------------------------------------

def a_run_in_a_bucket_is_the_run_in_a_folder(run_file: Path, folder: Path, scheme: str, seed: int) -> str:
    """Corpus, checkpoints and metrics in a bucket, every tenth request failing; killed after its first checkpoint,
    and gone on with. Then a byte of its last checkpoint is changed."""
    local, name = Started(arguments_of(run_file, folder / "local"), folder / "local.log"), f"{scheme}_{seed}"
    assert local.wait() == 0, local.text()[-3000:]
    with failing_bucket(scheme) as (url, proxy):
        url = f"{url}/run"
        arguments = [f"run_dir={url}" if part.startswith("run_dir=") else part for part in arguments_of(run_file, folder)]
        proxy.fail(0.1, seed)
        killed = Started(arguments, folder / f"{name}_killed.log")
        assert killed.wait_for(lambda: finished_steps(url), pause=0.3), killed.text()[-3000:]
        killed.end()
        second = Started(arguments, folder / f"{name}.log")
        assert second.wait(4 * PATIENCE) == 0, second.text()[-3000:]  # gcsfs waits long before it asks again
        assert "resuming from step" in second.text()
        told = (f"{scheme}://: {proxy.failed():,} of the {len(proxy.requests):,} requests of a killed and resumed run failed; "
                "its bits are those of a run in a folder; a byte turned in the bucket is found")
        proxy.fail(0)
        for below in sizes_below(url):
            (folder / name / below).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / below).write_bytes(read_bytes(f"{url}/{below}"))
        assert not differences(folder / name, folder / "local")
        *_, before, last = finished_steps(url)
        damaged = next(below for below in sizes_below(url) if below.startswith(f"checkpoints/{last}/") and "/c/" in below)
        content = bytearray(read_bytes(f"{url}/{damaged}"))
        content[len(content) // 2] ^= 1
        write_bytes(f"{url}/{damaged}", bytes(content))
        with Checkpoints(url) as checkpoints:
            assert checkpoints.choose(None) == before
    return told
