"""Raw texts, and the corpora that are made of them."""

import functools
import gzip
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import strategies as st

from fuzzed.damage import FILE_DAMAGES, SCALARS, VALUES, Damage, apply, damages
from fuzzed.world import World, call, command, tree
from jaxlm.data.corpus import Corpus
from jaxlm.settings import DataSettings, Settings
from jaxlm.tasks.find import find_task

# ------------------------------------------------------------------------------------------------------------- raw text

ODD_LINES = ["x" * 70_000, "\0", "\ufeff", "\r", "\u2028", "\x85", b"\xff\xfe", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", " ", "a\tb"]
GOOD_LINES = st.lists(st.text(max_size=30))
LINES = GOOD_LINES | st.lists(st.text(max_size=30) | st.binary(max_size=20) | st.sampled_from(ODD_LINES), max_size=8)
GOOD_RECORDS = st.lists(st.builds(lambda text: {"text": text}, st.text()), min_size=1, max_size=6)
RECORDS = GOOD_RECORDS | st.builds(
    lambda good, odd: good + odd, GOOD_RECORDS,
    st.lists(st.dictionaries(st.sampled_from(["text", "Text", "body"]), SCALARS, max_size=2) | VALUES, max_size=3))
ODD_JSON = ["{", "[" * 100_000, '{"text": ' + "[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": "\\ud800"}',
            '{"text": NaN}', '{"text": "a", "text": 5}']


@st.composite
def raw_files(draw: st.DrawFn) -> dict[str, bytes]:
    """Name and content of a few files, one of them often plain text."""
    files = {"good.txt": b"".join(b"line %d\n" % number for number in range(9))} if draw(st.booleans()) else {}
    for number in range(draw(st.integers(1, 2))):
        suffix = draw(st.sampled_from([*[".txt", ".jsonl", ".parquet", ".md"] * 2, ".bin"]))
        content = b"\n".join(line.encode(errors="surrogatepass") if isinstance(line, str) else line for line in draw(LINES))
        if suffix == ".jsonl" and draw(st.integers(0, 3)):
            odd = draw(st.sampled_from([[], [], [], *([line] for line in ODD_JSON)]))
            lines = [*(json.dumps(record) for record in draw(RECORDS)), *odd]
            content = "\n".join(lines).encode()
        if suffix == ".parquet" and draw(st.integers(0, 3)):
            content = draw(tables())
        compression = draw(st.sampled_from(["", "", ".gz", ".zst"]))
        if compression and draw(st.integers(0, 3)):
            content = gzip.compress(content, mtime=0) if compression == ".gz" else zstandard.compress(content)
        if draw(st.integers(0, 7)) == 0:
            where = draw(st.integers(0, len(content)))
            before, after = content[:where], content[where:]
            content = draw(st.sampled_from([before, before + b"\x80" + after[1:], content + content, after]))
        files[f"{number}{suffix}{compression}"] = content
    return files


COLUMNS = {  # a column's type, and a text as a value of it
    pyarrow.string(): str, pyarrow.large_string(): str, pyarrow.int64(): len, pyarrow.binary(): str.encode,
    pyarrow.list_(pyarrow.string()): lambda text: [text],
}


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A Parquet file with one column."""
    kind = draw(st.sampled_from(list(COLUMNS)))
    texts = draw(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=5))
    values = [None if text is None else COLUMNS[kind](text) for text in texts]
    name = draw(st.sampled_from(["text", "text", "body"]))
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values, kind)}), file)
    return file.getvalue()


RAW_TEXTS = st.tuples(raw_files(), st.tuples(
    st.sampled_from(["data.tokenizer=characters", "data.tokenizer=bytes"]),
    st.sampled_from(["data.document=line", "data.document=file"]),
    st.sampled_from(["data.validation=0.2", "data.validation=0", "data.validation_split=tail"]),
    st.sampled_from(["data.sequence_length=2", "data.shard_tokens=77", "data.cleaning.max_bytes=30",
                     "data.cleaning.exact_duplicates=true", "data.cleaning.near_duplicates=0.5",
                     "data.cleaning.repair_unicode=true", "data.cleaning.scripts=[latin]", "data.cleaning.max_repetition=0.5"])))


def check_raw_text(world: World, example: tuple[dict[str, bytes], tuple[str, ...]]) -> int:
    """A whole corpus, or one line and nothing else."""
    files, overrides = example
    with world.scratch() as folder:
        (folder / "raw").mkdir()
        for name, content in files.items():
            (folder / "raw" / name).write_bytes(content)
        before = tree(folder)
        ending = command("prepare", world.run_file, f"data.raw={folder / 'raw'}", f"data.corpus={folder / 'corpus'}",
                         f"run_dir={folder / 'run'}", *overrides)
        if ending.code:
            assert ending.code == 2 and tree(folder) == before, (ending, set(tree(folder)) ^ set(before))
        else:
            corpus = Corpus(folder / "corpus")
            read = corpus.train.read(0, corpus.train.num_tokens)
            assert corpus.train.offsets[-1] == len(read) and not (folder / "corpus.partial").exists()
            assert read.max(initial=0) < corpus.tokenizer.vocab_size
    return ending.code


# -------------------------------------------------------------------------------------------------------------- corpora

class Cut(NamedTuple):
    """A way to read a corpus."""

    packing: str
    damaged: str

    def rows(self, folder: Path) -> list[dict[str, np.ndarray]]:
        """Some batches of both splits."""
        corpus = Corpus(folder, whole=self.damaged == "stop")
        data = DataSettings(sequence_length=16, global_batch_size=8, packing=self.packing, damaged=self.damaged)
        task = find_task(Settings(data=data, seed=1))
        splits = [task.training_batches([(corpus, 1.0)]), task.validation_batches([corpus], batch_size=8)]
        return [batches.batch(step) for batches in splits for step in (0, 2, 5)]


@functools.cache
def whole_rows(corpus: Path, cut: Cut) -> list[dict[str, np.ndarray]]:
    return cut.rows(corpus)


CUTS = [Cut(packing, damaged) for packing in ("concatenate", "documents") for damaged in ("stop", "skip")]
CORPORA = st.tuples(damages(FILE_DAMAGES), st.sampled_from(CUTS), st.sampled_from([True, False, False, False]))


def check_corpus(world: World, example: tuple[list[Damage], Cut, bool]) -> int:
    """The rows that the whole corpus gives (skipping: or padding), or one line; nothing in the corpus is changed."""
    damage, cut, through_prepare = example
    wanted = whole_rows(world.corpus, cut)
    with world.scratch(world.corpus) as folder:
        for one in damage:
            apply(one, folder)
        before = tree(folder)
        found: list[dict[str, np.ndarray]] = []
        ending = call(lambda: found.extend(cut.rows(folder)))
        assert tree(folder) == before
        if through_prepare:
            command("prepare", world.run_file, f"data.corpus={folder}", f"data.damaged={cut.damaged}")
            assert before.items() <= tree(folder).items() or "manifest.json" not in before
    if ending.code == 0 and not any(one.kind == "signed json" for one in damage):
        for batch, right in zip(found, wanted, strict=True):
            for row in range(len(right["tokens"])):
                same = all((batch[name][row] == right[name][row]).all() for name in right)
                assert same or (cut.damaged == "skip" and not batch["loss_mask"][row].any()), row
    return ending.code
