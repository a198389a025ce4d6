"""Text and labelled records that every Python installation has: lines of its own library, and the package they are of.

    python examples/records.py FOLDER

Writes FOLDER/train.tsv, FOLDER/dev.tsv and FOLDER/test.tsv: `text` and `label`, the package that a line was taken from.
Whole files go to one of the three, so that no line is in two of them.
"""

import random
import sys
import sysconfig
from pathlib import Path

PACKAGES = ("asyncio", "email", "unittest", "xml")
LINES, SHORTEST = 600, 30  # of each package, at most; characters
SPLITS = {"train": 0.8, "dev": 0.9, "test": 1.0}  # up to which share of a package's files


def lines_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="ignore")
    return [" ".join(line.split()) for line in text.splitlines() if len(line.strip()) >= SHORTEST]


def main(folder: Path) -> None:
    draw, library = random.Random(0), Path(sysconfig.get_paths()["stdlib"])
    records: dict[str, list[str]] = {name: [] for name in SPLITS}
    for package in PACKAGES:
        files = sorted((library / package).rglob("*.py"))
        draw.shuffle(files)
        found: dict[str, set[str]] = {name: set() for name in SPLITS}
        for number, path in enumerate(files):
            split = next(name for name, share in SPLITS.items() if number < share * len(files))
            found[split].update(lines_of(path))
        for split, lines in found.items():
            kept = draw.sample(sorted(lines), min(LINES, len(lines)))
            records[split] += [f"{line}\t{package}" for line in kept if "\t" not in line]
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in records.items():
        draw.shuffle(rows)
        (folder / f"{split}.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
        print(f"{folder / split}.tsv: {len(rows):,} records")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
