"""Whether a change kept every bit of training: twelve short runs of a commit and of this checkout, compared.

    python benchmarks/same_curve.py --against COMMIT [--only NAME ...] [--envs DIR] [--python PYTHON] [--share-packages]
    python benchmarks/same_curve.py --list

Installs COMMIT, and the checkout that this file stands in (as it is, with what is not committed), in environments of
their own; trains benchmarks/same_curve.yaml on both sides through `jaxlm train`, on emulated CPU devices; and prints a
Markdown table. Compared bit by bit: the prepared text, every column of metrics.jsonl that is no time or speed (losses,
gradient norms, evaluations), and every parameter of the last checkpoint. Exit code 1 when anything differs.

--share-packages installs no packages: both sides use those of PYTHON, and each has only its own jaxlm on the path.
What is in DIR is used again while nothing that it was made from has changed: sources, versions, processor, settings;
delete DIR to start afresh. The two sides share what XLA has compiled, which it finds by the whole program: a program
that is the same on both sides is compiled once.
"""

import argparse
import fcntl
import hashlib
import io
import json
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

CONFIG = Path(__file__).with_suffix(".yaml")
ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ("jaxlm", "pyproject.toml", "README.md", "LICENSE")  # what of a checkout makes a difference once it is installed
TIMES = ("time", "mfu", "step_seconds", "data_wait_seconds", "tokens_per_second", "slots_per_second")
MARKER = "made_of.txt"
PROBE = """
import importlib.metadata, json, platform, jaxlm
packages = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "sentencepiece"
versions = {name: importlib.metadata.version(name) for name in packages}
print(json.dumps({"file": jaxlm.__file__, "versions": {"python": platform.python_version()} | versions}))
"""


class Training(NamedTuple):
    """One of the twelve."""

    what: str
    changes: str  # settings and options, as on the command line
    starts: tuple[int, ...] = (6,)  # train.steps of each start; every one after the first goes on from the one before


TRAININGS = {
    "gpt": Training("1 device; concatenate, dropout, evaluation", "model.dropout=0.1"),
    "gpt_modern": Training(
        "1 device, bfloat16; documents, accumulation, RoPE, RMS norms, grouped queries, untied table",
        "train.precision=bfloat16 train.gradient_accumulation=4 data.packing=documents model.positions=rope "
        "model.normalization=rmsnorm model.activation=swiglu model.num_kv_heads=2 model.qk_norm=true model.bias=false "
        "model.tied_embeddings=false model.z_loss=0.001 optimizer.name=lion"),
    "gpt_shards": Training(
        "8 devices: data 2, fsdp 2, tensor 2; documents, dropout, muon",
        "devices.count=8 mesh.data=2 mesh.fsdp=2 mesh.tensor=2 data.packing=documents model.dropout=0.1 optimizer.name=muon"),
    "gpt_context": Training(
        "8 devices: fsdp 2, context 4, bfloat16; documents, full remat",
        "devices.count=8 mesh.fsdp=2 mesh.context=4 train.precision=bfloat16 data.packing=documents train.remat=full"),
    "gpt_stages": Training(
        "8 devices: data 2, stage 2 interleaved, tensor 2; accumulation, dropout, resumed",
        "devices.count=8 mesh.data=2 mesh.stage=2 mesh.tensor=2 train.stage_repeats=2 train.gradient_accumulation=4 "
        "model.dropout=0.1", (4, 8)),
    "gpt_processes": Training(
        "2 processes x 4 devices: data 2, fsdp 4; documents, accumulation, dropout",
        "--processes=2 devices.count=4 mesh.data=2 mesh.fsdp=4 data.packing=documents train.gradient_accumulation=2 "
        "model.dropout=0.1"),
    "bert": Training(
        "1 device; next sentence, documents, whole words, dropout, LAMB",
        "model.family=bert model.next_sentence=true data.packing=documents data.tokenizer=wordpiece model.vocab_size=256 "
        "data.masking.whole_word=true model.dropout=0.1 optimizer.name=lamb"),
    "bert_resumed": Training(
        "1 device, bfloat16; next sentence, accumulation, dropout, resumed",
        "model.family=bert model.next_sentence=true data.packing=documents train.precision=bfloat16 "
        "train.gradient_accumulation=2 model.dropout=0.1", (4, 8)),
    "bert_shards": Training(
        "8 devices: fsdp 4, tensor 2; masked tokens only, concatenate",
        "model.family=bert devices.count=8 mesh.fsdp=4 mesh.tensor=2"),
    "bert_processes": Training(
        "2 processes x 4 devices: stage 2, context 2, data 2; next sentence, accumulation, dropout",
        "--processes=2 model.family=bert model.next_sentence=true data.packing=documents devices.count=4 mesh.stage=2 "
        "mesh.context=2 mesh.data=2 train.gradient_accumulation=2 model.dropout=0.1"),
    "moe": Training(
        "1 device; 4 experts with capacity, documents, Adafactor",
        "model.num_experts=4 model.capacity_factor=1.25 model.activation=swiglu data.packing=documents "
        "optimizer.name=adafactor"),
    "moe_shards": Training(
        "8 devices: stage 2, expert 2, tensor 2, bfloat16; 8 experts, dropless, accumulation, resumed",
        "devices.count=8 mesh.stage=2 mesh.expert=2 mesh.tensor=2 train.precision=bfloat16 model.num_experts=8 "
        "model.activation=swiglu train.gradient_accumulation=4", (4, 8)),
}


# ---- two sides -------------------------------------------------------------------------------------------------------

class Failed(Exception):
    """One side cannot be had: a command ended with an error, or left something else. The message is one line."""


class Side(NamedTuple):
    """One version, installed."""

    name: str
    command: list[str]  # the interpreter
    environment: dict[str, str]
    versions: dict[str, str]
    runs: Path  # folder of its run directories


def digest(value: Any) -> str:
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    if done.returncode:
        print(f"same_curve: {done.stderr.decode().strip().splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2)
    return done.stdout


def source(commit: str | None) -> dict[str, bytes]:
    """The files that an installation is made of, of a commit or (None) of the checkout as it is."""
    if commit is None:
        names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *INSTALLED).decode().split("\0")
        return {name: (ROOT / name).read_bytes() for name in sorted(set(names)) if (ROOT / name).is_file()}
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit, *INSTALLED))) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}


def made(folder: Path, recipe: str, make: Callable[[Path], None]) -> bool:
    """Makes a folder, unless it is there and complete, made by the same recipe. Returns whether it was there.

    Another process that wants the same folder waits until it is made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / MARKER).exists() and (folder / MARKER).read_text(encoding="utf-8") == recipe:
            return True
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        make(folder)
        (folder / MARKER).write_text(recipe, encoding="utf-8")  # last: a folder without it is incomplete
    return False


def install(name: str, commit: str | None, arguments: argparse.Namespace) -> Side:
    """An environment with that version of jaxlm, and with packages of its own unless they are to be shared."""
    files = source(commit)
    version = digest({path: digest(content) for path, content in files.items()})
    folder = arguments.envs / "sources" / version[:12]

    def export(folder: Path) -> None:
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)

    made(folder, version, export)
    python, environment = arguments.python, surroundings(arguments.envs)
    if arguments.share_packages:
        environment["PYTHONPATH"] = str(folder)
    else:
        venv = arguments.envs / "venvs" / digest([version, python])[:12]
        if not made(venv, f"{version} {python}", lambda venv: make_venv(python, venv, folder)):
            print(f"{name}: installed in {venv}", file=sys.stderr)
        python, folder = str(venv / "bin" / "python"), venv
    probe = json.loads(called([python, "-c", PROBE], environment, arguments.envs))
    if not Path(probe["file"]).is_relative_to(folder):  # else both sides might be the same jaxlm
        raise Failed(f"{name}: {python} imports {probe['file']}, expected jaxlm below {folder}")
    kind = "here" if commit is None else "commit"  # two sides, two runs, even where their sources are the same
    runs = arguments.envs / "runs" / f"{kind}-{version[:12]}-{digest([probe['versions'], processor()])[:6]}"
    return Side(name, [python], environment, probe["versions"], runs)


def make_venv(python: str, venv: Path, folder: Path) -> None:
    called([python, "-m", "venv", str(venv)], surroundings(venv), venv.parent)
    called([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", str(folder)], surroundings(venv), venv.parent)


def surroundings(envs: Path) -> dict[str, str]:
    """This process's environment without anything that would reach into the runs, and a folder for compiled
    programs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "PYTHON", "VIRTUAL_ENV"))}
    return kept | {"JAX_COMPILATION_CACHE_DIR": str(envs / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def processor() -> list[str]:
    """What the bits may depend on beside the program: the kind of processor, and how many this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.machine(), platform.processor()]
    kind = {line for line in lines if line.startswith(("model name", "flags", "Features")) or not cpuinfo.exists()}
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [*sorted(kind), str(count)]


def called(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """What a command prints that runs in `folder`. Raises Failed with the last line that it said; all of it is in
    failed.txt."""
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        output = f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        (folder / "failed.txt").write_text(output, encoding="utf-8")
        lines = [line for line in output.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("jaxlm: ")] or lines
        raise Failed(f"exit code {done.returncode}: {said[-1]} (see {folder / 'failed.txt'})")
    return done.stdout


# ---- twelve trainings ------------------------------------------------------------------------------------------------

def text() -> str:
    """Documents of a few sentences, a line each, of made-up words."""
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(300)]

    def sentence() -> str:
        return f"{' '.join(draw.choices(words, k=draw.randint(3, 9))).capitalize()}."

    return "".join(f"{' '.join(sentence() for _ in range(draw.randint(2, 8)))}\n" for _ in range(400))


def train(side: Side, name: str) -> Path:
    """The run directory of a training, which is made unless it is there."""
    training, documents, config = TRAININGS[name], text(), CONFIG.read_text(encoding="utf-8")
    commands = [["-m", "jaxlm", "train", "run.yaml", "run_dir=run", f"train.steps={steps}", *training.changes.split()]
                for steps in training.starts]

    def make(folder: Path) -> None:
        (folder / "run.yaml").write_text(config, encoding="utf-8")
        (folder / "text.txt").write_text(documents, encoding="utf-8")
        for command in commands:
            called([*side.command, *command], side.environment, folder)

    began = time.monotonic()
    reused = made(side.runs / name, json.dumps([commands, digest([documents, config])]), make)
    said = "used again" if reused else f"{time.monotonic() - began:.0f} s"
    print(f"{name}, {side.name}: {said}", file=sys.stderr)
    return side.runs / name / "run"


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read_parameters(run_dir: Path) -> dict[str, np.ndarray]:
    """{path: array} of the newest checkpoint, whatever mesh it was saved from, in the order of its tree."""
    finished = [int(path.parent.name) for path in run_dir.glob("checkpoints/*/manifest.json") if path.parent.name.isdigit()]
    state = run_dir.resolve() / "checkpoints" / str(max(finished)) / "state"
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    contents = ocp.checkpointables_metadata(state).metadata
    if "params" not in contents:
        raise Failed(f"{state}: no 'params' among {', '.join(contents)}")
    saved = contents["params"]
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
    tree = ocp.load_checkpointables(state, {"params": wanted})["params"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def read_corpus(run_dir: Path) -> dict[str, str]:
    """{file: digest} of the prepared text: tokens, where documents begin, and the tokenizer; not what it says of
    itself."""
    corpus = run_dir / "corpus"
    files = [*corpus.glob("*.npy"), *corpus.glob("tokenizer/*")]
    return {str(path.relative_to(corpus)): digest(path.read_bytes())
            for path in sorted(files) if not path.name.startswith("jaxlm_") and not path.name.endswith(".crc32.npy")}


# ---- comparing -------------------------------------------------------------------------------------------------------

class Difference(NamedTuple):
    """Something that is not the same, bit by bit."""

    where: str
    size: float  # relative to the largest number; infinite where there is nothing to compare with
    what: str = ""  # before -> after


def differing(before: np.ndarray, after: np.ndarray) -> float | None:
    """How far two arrays of the same shape and type are apart, relative to the largest number; None: every bit is the
    same.

    NaN is the same as NaN, whatever its bits; 0 is not the same as -0.
    """
    bits = np.dtype(f"u{before.dtype.itemsize}")
    both_nan = (before != before) & (after != after)  # all that differs from itself
    same = (before.view(bits) == after.view(bits)) | both_nan
    if same.all():
        return None
    one, other = before.astype(np.float64)[~both_nan], after.astype(np.float64)[~both_nan]
    largest = max(np.abs(one).max(), np.abs(other).max())
    if not np.isfinite(largest):
        return float("inf")
    return float(np.abs(one - other).max() / largest) if largest else 0.0


def numbers(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, str], np.ndarray]:
    """{(step, column): number} of all that is no time, speed or text. JSON's null stands for what is not finite."""
    return {(row["step"], column): np.array(np.nan if value is None else value, np.float64)
            for row in rows for column, value in row.items()
            if column not in TIMES and column != "step" and isinstance(value, int | float | None)}


def compare_rows(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[list[Difference], set[str]]:
    """Differences between two metrics.jsonl by step, and the columns that only the second has."""
    old, new = numbers(before), numbers(after)
    known = {column for _, column in old}
    found = []
    for step, column in sorted(dict.fromkeys([*old, *new]), key=lambda key: key[0]):
        here, there = old.get((step, column)), new.get((step, column))
        if here is None or there is None:
            if column in known:
                found.append(only(f"step {step}, {column}", here is not None))
        elif (size := differing(here, there)) is not None:
            found.append(Difference(f"step {step}, {column}", size, f"{here} -> {there}"))
    return found, {column for _, column in new} - known


def only(where: str, before: bool) -> Difference:
    """Something that one side does not have."""
    return Difference(where, float("inf"), f"only {'before' if before else 'after'}")


def paired(before: Iterable[str], after: Iterable[str]) -> list[tuple[str | None, str | None]]:
    """Paths that belong together: the same ones, and of the others the first with the first, and so on."""
    before, after = list(before), list(after)
    gone = [path for path in before if path not in after]
    come = [path for path in after if path not in before]
    longest = max(len(gone), len(come))
    rest = zip(gone + [None] * (longest - len(gone)), come + [None] * (longest - len(come)), strict=True)
    return [*((path, path) for path in before if path in after), *rest]


def compare_arrays(before: dict[str, np.ndarray],
                   after: dict[str, np.ndarray]) -> tuple[list[Difference], dict[str, str]]:
    """Differences between two trees of arrays, and what each renamed path is called in the second."""
    found, renamed = [], {}
    for old, new in paired(before, after):
        if old is None or new is None:
            found.append(only(old or new, old is not None))
            continue
        here, there = before[old], after[new]
        if old != new:
            renamed[old] = new
        if (here.shape, here.dtype) != (there.shape, there.dtype):
            found.append(Difference(old, float("inf"),
                                    f"{here.dtype}{list(here.shape)} -> {new}, {there.dtype}{list(there.shape)}"))
        elif (size := differing(here, there)) is not None:
            found.append(Difference(new, size))
    return found, renamed


def compare_files(before: dict[str, str], after: dict[str, str]) -> list[Difference]:
    """Files of the first whose content the second has under no name."""
    return [Difference(f"corpus, {name}", float("inf"), "another digest")
            for name, content in before.items() if content not in after.values()]


class Comparison(NamedTuple):
    """What a training gave on both sides."""

    steps: int
    numbers: int  # compared in metrics.jsonl
    arrays: int
    text: list[Difference]
    metrics: list[Difference]  # by step
    parameters: list[Difference]
    renamed: dict[str, str]
    new_columns: set[str]

    @property
    def differences(self) -> list[Difference]:
        return [*self.text, *self.metrics, *self.parameters]


def compare(before: Path, after: Path) -> Comparison:
    """Two run directories."""
    rows, parameters = read_rows(before), read_parameters(before)
    metrics, new_columns = compare_rows(rows, read_rows(after))
    of_parameters, renamed = compare_arrays(parameters, read_parameters(after))
    return Comparison(max(row["step"] for row in rows), len(numbers(rows)), len(parameters),
                      compare_files(read_corpus(before), read_corpus(after)), metrics, of_parameters, renamed, new_columns)


# ---- the table -------------------------------------------------------------------------------------------------------

def cells(comparison: Comparison) -> list[str]:
    """Steps; equal, or what differs first; the largest differences of metrics and of parameters."""
    found = comparison.differences
    result = f"equal ({comparison.numbers} numbers, {comparison.arrays} arrays)"
    if found:
        result = f"**{found[0].where}**" + (f": {found[0].what}" if found[0].what else "")
        result += f", and {len(found) - 1} more" if found[1:] else ""
    return [str(comparison.steps), result, largest(comparison.metrics), largest(comparison.parameters)]


def largest(differences: list[Difference]) -> str:
    if not differences:
        return "0"
    most = max(differences, key=lambda difference: difference.size)
    return f"{most.size:.1e} ({most.where})"


def interpreter(name: str) -> str:
    """The whole path of PYTHON, since commands run elsewhere; a link stays one (a virtual environment's is)."""
    found = shutil.which(name)
    if found is None:
        raise argparse.ArgumentTypeError(f"{name}: no such program")
    return os.path.abspath(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="what to compare this checkout with")
    parser.add_argument("--only", nargs="+", choices=TRAININGS, metavar="NAME", default=list(TRAININGS))
    parser.add_argument("--envs", type=lambda path: Path(path).expanduser().resolve(), metavar="DIR",
                        default="~/.cache/jaxlm/same_curve", help="folder of environments and runs")
    parser.add_argument("--python", type=interpreter, default=sys.executable, help="interpreter of both sides")
    parser.add_argument("--share-packages", action="store_true", help="use PYTHON's packages on both sides")
    parser.add_argument("--list", action="store_true", help="name the trainings")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:15} {training.what}" for name, training in TRAININGS.items()))
        return 0
    if not arguments.against:
        parser.error("--against COMMIT is needed")
    arguments.envs.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")
    try:
        sides = install(arguments.against, arguments.against, arguments), install("this checkout", None, arguments)
    except Failed as error:
        print(f"same_curve: {error}", file=sys.stderr)
        return 2
    return report(*sides, arguments.only)


def report(before: Side, after: Side, names: Iterable[str]) -> int:
    """Trains, prints the table, and what is to be known beside it. Returns 1 when anything differs."""
    print_row(["training", "what it is", "steps", "result", "metrics", "parameters"])
    print_row(["---"] * 6)
    equal, renamed, columns = 0, {}, set()
    for name in names:
        try:
            comparison = compare(train(before, name), train(after, name))
        except Failed as error:
            print_row([name, TRAININGS[name].what, "", f"**{error}**", "", ""])
            continue
        print_row([name, TRAININGS[name].what, *cells(comparison)])
        equal += not comparison.differences
        renamed |= comparison.renamed
        columns |= comparison.new_columns
    print(f"\n{before.name} and {after.name}: {equal} of {len(names)} equal; "
          f"{', '.join(f'{name} {version}' for name, version in after.versions.items())}")
    print_notes(before, after, renamed, columns)
    return int(equal < len(names))


def print_row(row: Iterable[str]) -> None:
    """One of a Markdown table."""
    print(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |", flush=True)


def print_notes(before: Side, after: Side, renamed: dict[str, str], columns: set[str]) -> None:
    """What has another name, what is new, and versions where they are not the same."""
    notes = [f"renamed: {old} -> {new}" for old, new in renamed.items()]
    notes += [f"new in metrics.jsonl, compared with nothing: {column}" for column in sorted(columns)]
    notes += [f"WARNING: {name} {before.versions[name]} on one side, {version} on the other"
              for name, version in after.versions.items() if version != before.versions[name]]
    if notes:
        print("\n" + "\n".join(f"- {note}" for note in notes))


if __name__ == "__main__":
    sys.exit(main())
