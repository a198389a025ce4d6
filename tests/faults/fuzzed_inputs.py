"""Random run files, targets, raw texts, corpora, checkpoint folders and run directories, and what must be true of each."""

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
import zstandard
from fuzzing import FILE_DAMAGES, RUN, SCALARS, VALUES, Damage, World, apply, damages, refused, told, tree
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.data.corpus import Corpus
from jaxlm.data.loading import Batches, training_batches, validation_batches
from jaxlm.reporting.goodput import goodput
from jaxlm.settings import DataSettings, Settings, dump, sections
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.manifest import finished_steps

KEYS = {name: kind for name, kind, *_ in config.key_table()}
SECTIONS = [name for name, _ in sections()]


class Kind(NamedTuple):
    """One kind of input: how examples are drawn, and the check of one, which raises AssertionError or what it met."""

    examples: st.SearchStrategy
    check: Callable[[World, Any], None]
    share: int  # of 100 examples


# ------------------------------------------------------------------------------------------------------------- run files

NUMBERS = {
    "integer": st.integers(1, 64) | st.integers() | st.sampled_from([0, -1, 2**31, 2**63, 10**18, 10**400]),
    "number": st.floats() | st.floats(0, 1) | st.integers(-3, 3) | st.sampled_from([1e308, -1e308, 5e-324, 1e-320]),
    "text": st.text(max_size=10),
    "null": st.none(),
}


def fitting(kind: str) -> st.SearchStrategy:
    """Values that mostly are of a key's type, as the key table writes it."""
    choices = []
    for part in kind.split(" | "):
        known = next((strategy for name, strategy in NUMBERS.items() if part.startswith(name)), st.just(part))
        choices.append(known)
    if "true" in kind:
        choices = [st.booleans()]
    if "list of" in kind:
        choices.append(st.lists(st.text(max_size=5), max_size=3))
    if "mapping of" in kind:
        names = sorted({word for word in kind.replace("mapping of", "").replace(" to ", " | ").split(" | ") if word.isidentifier()})
        choices.append(st.dictionaries(st.sampled_from([*names, "x"]), st.integers(1, 4) | st.sampled_from([*names, 0.5]), max_size=3))
    return st.one_of(choices)


@st.composite
def misspelt(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from([*KEYS, *SECTIONS]))
    where = draw(st.integers(0, len(name)))
    return name[:where] + draw(st.sampled_from(["", "x", "_", ".", "\n", "é"])) + name[where + draw(st.integers(0, 2)):]


def assignments(odd: bool) -> st.SearchStrategy[tuple[str, Any]]:
    """(key, value); `odd`: or what is none."""
    right = st.sampled_from(sorted(KEYS)).flatmap(lambda name: st.tuples(st.just(name), fitting(KEYS[name])))
    wrong = st.tuples(st.sampled_from([*KEYS, *SECTIONS]) | misspelt(), VALUES)
    return right | wrong if odd else right


@st.composite
def nested(draw: st.DrawFn, odd: bool = True) -> dict[str, Any]:
    """The values of a run file: those of a good one, some of them changed."""
    values: dict[str, Any] = {name: dict(value) for name, value in RUN.items()}
    values["model"]["vocab_size"] = 300
    for name, value in draw(st.lists(assignments(odd), max_size=4)):
        *path, last = name.split(".")
        inner: Any = values
        for part in path:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[last] = value
    return values


SNIPPETS = [
    "a: &a [*a]", "model: &m {model: *m}", "data: &d {cleaning: *d}", "? [1, 2]\n: 3", "? {a: b}\n: 3", "<<: 1", "<<: [1]", "1: 2",
    "null: 1", "true: 1", "seed: 2001-99-99", "seed: 2001-01-01", "2001-99-99: 1", "seed: 1:99:99", "seed: 0o9", "seed: 0b2", "seed: 0x",
    "seed: !!int x", "seed: !!float x", "seed: !!bool x", "seed: !!timestamp x", "seed: !!binary é", "seed: !!null x", "seed: =", "seed: !!set {a}",
    "seed: !!omap [a: 1]", "seed: !!pairs [a]", "seed: !!python/object/apply:os.getcwd []", "seed: !x y", "%YAML 9.9\n---\nseed: 1",
    "---\nseed: 1\n---\nseed: 2", "seed: " + "9" * 5000, "seed: " + "[" * 2000, "seed: " + "{a: " * 1500, "a: " * 500, "- " * 2000 + "1",
    "run_dir: \"\\ud800\"", "run_dir: \"\\0\"", "run_dir: \"a\\nb\"", "seed: |\n  a\n  b", "seed: &x 1\ntrain: {steps: *y}", "seed: 1\nseed: 1",
    "model: {num_layers: 1, num_layers: 1}", "model:\nmodel:", "\ufeffseed: 1", "\x85", "\u2028", "seed: \x00", "\t", "model:\n\tx: 1", "seed : : 1", "'", '"', "[", "}",
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "\nseed: *i",
]


@st.composite
def run_texts(draw: st.DrawFn) -> bytes:
    """A run file: YAML, mostly."""
    kind = draw(st.sampled_from(["yaml", "yaml", "snippet", "mixed", "broken", "text", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "text":
        return draw(st.text(max_size=100)).encode(errors="surrogatepass")
    if kind == "snippet":
        return "\n".join(draw(st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=2))).encode(errors="surrogatepass")
    text = yaml.safe_dump(draw(nested()), allow_unicode=draw(st.booleans()), default_flow_style=draw(st.sampled_from([None, True, False])))
    if kind == "mixed":
        text += draw(st.sampled_from(SNIPPETS))
    if kind == "broken":
        where = draw(st.integers(0, len(text)))
        text = text[:where] + draw(st.text(max_size=3) | st.sampled_from(["\n", "\t", ": ", "- ", "&a ", "*a", "!!", "#"])) + text[where + draw(st.integers(0, 9)):]
    return text.encode(errors="surrogatepass")


def as_override(assignment: tuple[str, Any]) -> str:
    name, value = assignment
    return f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)).strip()}"


OVERRIDES = st.lists(assignments(odd=True).map(as_override) | st.text(max_size=20) | misspelt()
                     | st.tuples(st.sampled_from(sorted(KEYS)), st.sampled_from(SNIPPETS) | st.text(max_size=9)).map("=".join), max_size=2)


def check_run_file(world: World, example: tuple[bytes, list[str]]) -> None:
    """It is read as settings, or refused in one line that names the file or a key. Settings survive being written and read."""
    content, overrides = example
    path = world.folder / "random.yaml"
    path.write_bytes(content)
    found: list[Settings] = []
    line = refused(lambda: found.append(config.load(path, overrides)))
    if line is None:
        path.write_text(dump(found[0]), encoding="utf-8")
        assert refused(lambda: found.append(config.load(path))) is None and found[0] == found[1]
    else:
        assert str(path) in line or any(name in line for name in [*KEYS, *SECTIONS]) or any(o[:9] in line for o in overrides), line


# --------------------------------------------------------------------------------------------------------------- plans

SIZES = st.integers(0, 33).map(str) | st.sampled_from(["4", "8", "16", "999999999999999999999", "1000000", "00", "-1", "٣", "²"])
TARGETS = st.one_of(
    st.sampled_from(["cpu:8", "cpu:1", "v5p:4x4x4", "v4-8", "v5litepod-16", "2xv5e:16x16", "h100:8x4", "b200:8", "tpu7x:2x2x1"]),
    st.builds(lambda islands, kind, sep, sizes: f"{islands}{kind}{sep}{'x'.join(sizes)}", st.sampled_from(["", "", "2x", "0x", "99999999x"]),
              st.sampled_from(["cpu", "v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "h200", "b200", "v5litepod", "x"]),
              st.sampled_from([":", ":", ":", "-", ""]), st.lists(SIZES, max_size=4)),
    st.text(max_size=10))


def check_plan(world: World, example: tuple[dict[str, Any], str, bool, bool]) -> None:
    """There is a plan, or one line; nothing is written."""
    values, target, fast, as_json = example
    path = world.folder / "random.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    before = tree(world.folder)
    result = told("plan", path, f"--target={target}", "--fast" if fast else "--explain", *(["--json"] if as_json and fast else []))
    assert result.code in (0, 2) and tree(world.folder) == before, result
    if as_json and fast and not result.code:
        json.loads(result.out, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))


# ------------------------------------------------------------------------------------------------------------- raw text

LINES = st.lists(st.text(max_size=30) | st.binary(max_size=20) | st.sampled_from([
    "x" * 70_000, "\0", "\ufeff", "\r", "\u2028", "\x85", b"\xff\xfe", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", " ", "a\tb"]), max_size=8)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["text", "Text", "body"]), SCALARS, max_size=2) | VALUES | st.builds(lambda text: {"text": text}, st.text()),
                   max_size=6)
NESTED_JSON = ["{", "[" * 100_000, '{"text": ' + "[" * 100_000, '{"text": "\\ud800"}', '{"text": ' + "9" * 5000 + "}", '{"text": NaN}', '{"text": "a", "text": 5}']


@st.composite
def raw_files(draw: st.DrawFn) -> dict[str, bytes]:
    """Name and content of up to three files."""
    files = {}
    for number in range(draw(st.integers(1, 3))):
        suffix = draw(st.sampled_from([".txt", ".txt", ".jsonl", ".parquet", ".md", ".bin"]))
        content = b"\n".join(line.encode(errors="surrogatepass") if isinstance(line, str) else line for line in draw(LINES))
        if suffix == ".jsonl" and draw(st.booleans()):
            lines = [json.dumps(record) for record in draw(RECORDS)] + draw(st.lists(st.sampled_from(NESTED_JSON), max_size=1))
            content = "\n".join(lines).encode()
        if suffix == ".parquet" and draw(st.integers(0, 3)):
            content = draw(tables())
        compression = draw(st.sampled_from(["", "", ".gz", ".zst"]))
        if compression and draw(st.integers(0, 3)):
            content = gzip.compress(content, mtime=0) if compression == ".gz" else zstandard.compress(content)
        if draw(st.integers(0, 3)) == 0:
            where = draw(st.integers(0, len(content)))
            content = draw(st.sampled_from([content[:where], content[:where] + b"\x80" + content[where + 1:], content + content, content[where:]]))
        files[f"{number}{suffix}{compression}"] = content
    return files


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from([pyarrow.string(), pyarrow.large_string(), pyarrow.int64(), pyarrow.binary(), pyarrow.list_(pyarrow.string())]))
    texts = draw(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=5))
    values = [text if text is None or "string" in str(kind) and "list" not in str(kind) else
              [text] if "list" in str(kind) else text.encode() if kind == pyarrow.binary() else len(text) for text in texts]
    file = io.BytesIO()
    names = draw(st.sampled_from([["text"], ["text"], ["body"]]))
    pyarrow.parquet.write_table(pyarrow.table({names[0]: pyarrow.array(values, kind)}), file)
    return file.getvalue()


def check_raw(world: World, example: tuple[dict[str, bytes], list[str]]) -> None:
    """A whole corpus, or one line and nothing else."""
    files, overrides = example
    with world.scratch() as folder:
        (folder / "raw").mkdir()
        for name, content in files.items():
            (folder / "raw" / name).write_bytes(content)
        before = tree(folder)
        result = told("prepare", world.run_file, f"data.raw={folder / 'raw'}", f"data.corpus={folder / 'corpus'}",
                      f"run_dir={folder / 'run'}", *overrides)
        if result.code:
            assert result.code == 2 and tree(folder) == before, (result, set(tree(folder)) ^ set(before))
        else:
            corpus = Corpus(folder / "corpus")
            read = corpus.train.read(0, corpus.train.num_tokens)
            assert corpus.train.offsets[-1] == len(read) and not (folder / "corpus.partial").exists()
            assert read.max(initial=0) < corpus.tokenizer.vocab_size


RAW_OVERRIDES = st.tuples(
    st.sampled_from(["data.tokenizer=characters", "data.tokenizer=bytes"]), st.sampled_from(["data.document=line", "data.document=file"]),
    st.sampled_from(["data.validation=0.2", "data.validation=0", "data.validation_split=tail"]),
    st.sampled_from(["data.sequence_length=2", "data.shard_tokens=7", "data.cleaning.max_bytes=30", "data.cleaning.exact_duplicates=true",
                     "data.cleaning.near_duplicates=0.5", "data.cleaning.repair_unicode=true", "data.cleaning.scripts=[latin]",
                     "data.cleaning.max_repetition=0.5"])).map(list)


# --------------------------------------------------------------------------------------------------------------- corpora

class Cut(NamedTuple):
    """A way to read a corpus."""

    packing: str
    damaged: str

    def batches(self, folder: Path) -> list[Batches]:
        corpus = Corpus(folder, whole=self.damaged == "stop")
        data = DataSettings(sequence_length=16, global_batch_size=8, packing=self.packing, damaged=self.damaged)
        return [training_batches([(corpus, 1.0)], data, family="gpt", seed=1),
                validation_batches(corpus, data, family="gpt", batch_size=8)]

    def rows(self, folder: Path) -> list[dict[str, np.ndarray]]:
        return [batches.batch(step) for batches in self.batches(folder) for step in (0, 2, 5)]


CUTS = [Cut(packing, damaged) for packing in ("concatenate", "documents") for damaged in ("stop", "skip")]


class Wanted:
    """The batches of the whole corpus, by cut; once."""

    rows: dict[Cut, list[dict[str, np.ndarray]]] = {}  # noqa: RUF012

    @classmethod
    def of(cls, world: World, cut: Cut) -> list[dict[str, np.ndarray]]:
        if cut not in cls.rows:
            cls.rows[cut] = cut.rows(world.corpus)
        return cls.rows[cut]


def check_corpus(world: World, example: tuple[list[Damage], Cut, bool]) -> None:
    """The rows that the whole corpus gives (skipping: or padding), or one line; nothing in the corpus is changed."""
    damage, cut, through_prepare = example
    wanted = Wanted.of(world, cut)
    with world.scratch(world.corpus) as folder:
        for one in damage:
            apply(one, folder)
        before = tree(folder)
        found: list[dict[str, np.ndarray]] = []
        line = refused(lambda: found.extend(cut.rows(folder)))
        if through_prepare:
            told("prepare", world.run_file, f"data.corpus={folder}", f"data.damaged={cut.damaged}")
        assert set(before) <= set(tree(folder)) or through_prepare and not (before.keys() & {"manifest.json"})
        if line is None and not any(one.kind == "signed json" for one in damage):
            for batch, right in zip(found, wanted, strict=True):
                same = [all((batch[name][row] == right[name][row]).all() for name in right) for row in range(len(right["tokens"]))]
                assert all(fine or cut.damaged == "skip" and not batch["loss_mask"][row].any() for row, fine in enumerate(same))


# ----------------------------------------------------------------------------------------------------------- checkpoints

def check_checkpoints(world: World, example: tuple[list[Damage], int | None, str]) -> None:
    """The newest checkpoint that is as it was written, under its own name, or one line; nothing is written by who only reads."""
    damage, step, how = example
    original, signed = tree(world.run / "checkpoints"), any(one.kind == "signed json" for one in damage)
    with world.scratch(world.run) as run:
        for one in damage:
            apply(one, run / "checkpoints")
        before = tree(run)
        found: list[int] = []

        def choose() -> None:
            with Checkpoints(run) as checkpoints:
                found.append(checkpoints.choose(step))
                assert signed or checkpoints.metadata(found[0])["settings"]["seed"] == 0

        line = refused(choose)
        assert tree(run) == before
        if line is None and not signed:
            assert found[0] in (1, 2, 3) and (step is None or found[0] == step)
            assert all(before[f"checkpoints/{name}"] == digest for name, digest in original.items() if name.startswith(f"{found[0]}/"))
        if line is None or step is None and not signed:
            whole = [int(name) for name in ("1", "2", "3") if all(
                before.get(f"checkpoints/{file}") == digest for file, digest in original.items() if file.startswith(f"{name}/"))]
            assert signed or (max(whole) == found[0] if step is None and found else not whole or found), (whole, found)
        if how == "evaluate" and not signed:
            told("evaluate", run, *([f"checkpoint.step={step}"] if step else []))
        if how == "write":
            check_writing(run, before)


def check_writing(run: Path, before: dict[str, str]) -> None:
    """Who goes on with a run removes unfinished saves and sets damaged ones aside, in the run's folder only."""
    settings = config.load(run)
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("theirs")
    (outside / "manifest.json").write_text("{}")
    for name in ("7", "9"):
        if not (run / "checkpoints" / name).exists():
            (run / "checkpoints" / name).symlink_to(outside)
    (outside / "manifest.json").unlink()
    kept = tree(outside)

    def go_on() -> None:
        with Checkpoints(run, settings.checkpoint) as checkpoints:
            checkpoints.choose(None)

    refused(go_on)
    assert tree(outside) == kept
    assert all((run / name).exists() for name in before if not name.startswith("checkpoints"))
    shutil.rmtree(outside)


# ------------------------------------------------------------------------------------------------------- run directories

RUN_FILES = ("config.yaml", "metrics.jsonl", "goodput.jsonl", "summary.json", "samples.txt")
FIGURES = ("step", "loss", "val_loss", "val_bits_per_byte", "tokens_per_second", "step_seconds", "data_wait_seconds", "mfu", "began", "seconds", "from", "to",
           "skipped", "steps", "wall_seconds", "tokens", "parameters", "devices", "mesh", "compile_seconds", *("startup", "evaluation", "checkpoint"))


@st.composite
def run_changes(draw: st.DrawFn) -> tuple[str, str, Any]:
    """(file, how, what)."""
    name = draw(st.sampled_from(RUN_FILES))
    how = draw(st.sampled_from(["damage", "value", "value", "value", "line"]))
    if how == "damage":
        return name, how, draw(damages(tuple(kind for kind in FILE_DAMAGES if kind not in ("rename", "junk", "json", "signed json"))))[0]
    if how == "line":
        return name, how, draw(VALUES.map(json.dumps) | st.text(max_size=30) | st.just("[" * 100_000))
    if name == "config.yaml":
        return name, how, (draw(st.sampled_from([*KEYS, *SECTIONS])), draw(VALUES), 0)
    return name, how, (draw(st.sampled_from(FIGURES)), draw(VALUES), draw(st.integers(0, 9)))


def change_run(run: Path, change: tuple[str, str, Any]) -> None:
    name, how, what = change
    path = run / name
    if not path.is_file() or path.is_symlink():
        return
    if how == "damage":
        alone = run.parent / "alone"
        alone.mkdir()
        shutil.move(path, alone / name)
        apply(what, alone)
        for left in list(alone.iterdir()):
            os.rename(left, run / left.name)
        alone.rmdir()
        if (run / name).is_symlink():
            (run / name).unlink()
            (run / name).symlink_to(name)
    elif how == "line":
        with open(path, "a", encoding="utf-8", errors="surrogatepass") as file:
            file.write(f"{what}\n")
    else:
        replace_value(path, *what)


def replace_value(path: Path, name: str, value: Any, where: int) -> None:
    if path.suffix == ".yaml":
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        *parents, last = name.split(".")
        inner = values
        for part in parents:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[last] = value
            path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        place = where % len(lines)
        lines[place] = json.dumps(json.loads(lines[place]) | {name: value})
        path.write_text("\n".join(lines) + "\n")


def check_report(world: World, example: tuple[list[tuple[str, str, Any]], bool]) -> None:
    """A report, or one line; of several runs, a table, or one line."""
    changes, several = example
    with world.scratch() as folder:
        run = folder / "run"
        shutil.copytree(world.run, run, ignore=shutil.ignore_patterns("checkpoints", "*.png", "report.md", "corpus"))
        for change in changes:
            with_care(lambda change=change: change_run(run, change))
        before = tree(run)
        result = told("report", run, *([world.run] if several else []))
        written = {"comparison.png"} if several else {"report.md"}
        after = tree(run)
        assert {name for name in after if after[name] != before.get(name)} <= (written if result.code == 0 else set()), result
        refused(lambda: goodput(run))
        refused(lambda: finished_steps(run))


def with_care(change: Callable[[], None]) -> None:
    """A second change may find nothing left that it can change."""
    try:
        change()
    except (ValueError, OSError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
        return


KINDS = {
    "run files": Kind(st.tuples(run_texts(), OVERRIDES), check_run_file, 40),
    "plans": Kind(st.tuples(nested(odd=False), TARGETS, st.integers(0, 3).map(bool), st.booleans()), check_plan, 15),
    "raw texts": Kind(st.tuples(raw_files(), RAW_OVERRIDES), check_raw, 10),
    "corpora": Kind(st.tuples(damages(FILE_DAMAGES), st.sampled_from(CUTS), st.integers(0, 3).map(lambda n: n == 3)), check_corpus, 15),
    "checkpoints": Kind(st.tuples(damages(FILE_DAMAGES), st.sampled_from([None, None, None, 1, 2, 3, 7]),
                                  st.sampled_from([*["choose"] * 14, *["write"] * 5, "evaluate"])), check_checkpoints, 15),
    "run directories": Kind(st.tuples(st.lists(run_changes(), min_size=1, max_size=3), st.integers(0, 9).map(lambda n: n == 9)), check_report, 5),
}
