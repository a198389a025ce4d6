"""Writes specs/CONFIG.txt: how each parameter of each shipped config is cut, so that a change of sharding shows in a
diff.

    python tests/golden/make_specs.py
"""

import dataclasses
from pathlib import Path

import jax

from jaxlm import config
from jaxlm.models.model import Model
from jaxlm.parallel.sharding import spec
from jaxlm.tasks.find import find_task

ROOT = Path(__file__).parents[2]
SPECS = Path(__file__).with_name("specs")


def describe(path: Path) -> str:
    """A line for each parameter: its name, shape, axes, and mesh axes."""
    settings = config.load(path)
    model = dataclasses.replace(settings.model, vocab_size=settings.model.vocab_size or 256)
    model = Model(model, settings.train, find_task(settings).objectives())
    rows, shapes = [], jax.tree_util.tree_flatten_with_path(model.shapes)[0]
    for (place, shape), axes in zip(shapes, jax.tree.leaves(model.axes), strict=True):
        cuts = (cut if isinstance(cut, str) else "-" if cut is None else "+".join(cut) for cut in spec(*axes.names))
        rows.append((".".join(entry.key for entry in place), " x ".join(map(str, shape.shape)),
                     ", ".join(name or "-" for name in axes.names), ", ".join(cuts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows)


def main() -> None:
    SPECS.mkdir(exist_ok=True)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        (SPECS / f"{path.stem}.txt").write_text(describe(path), encoding="utf-8")


if __name__ == "__main__":
    main()
