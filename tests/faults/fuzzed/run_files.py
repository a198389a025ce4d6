"""Run files, and plans of those that are mostly right."""

import itertools
import json
from typing import Any

import yaml
from hypothesis import strategies as st

from fuzzed.damage import VALUES
from fuzzed.world import RUN, World, call, command, tree
from jaxlm import config
from jaxlm.settings import Settings, dump, sections

KEYS = {name: kind for name, kind, *_ in config.key_table()}
SECTIONS = [name for name, _ in sections()]

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
        words = kind.replace("mapping of", "").replace(" to ", " | ").split(" | ")
        names = sorted({word for word in words if word.isidentifier()})
        values = st.integers(1, 4) | st.sampled_from([*names, 0.5])
        choices.append(st.dictionaries(st.sampled_from([*names, "x"]), values, max_size=3))
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
def nested(draw: st.DrawFn, changes: st.SearchStrategy[list[tuple[str, Any]]]) -> dict[str, Any]:
    """The values of a run file: those of a good one, some of them changed."""
    values: dict[str, Any] = {name: dict(value) for name, value in RUN.items()}
    values["model"]["vocab_size"] = 300
    for name, value in draw(changes):
        *path, last = name.split(".")
        inner: Any = values
        for part in path:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[last] = value
    return values


# YAML of which each has once broken a reader, or could.
SNIPPETS = [
    # anchors and merges
    "a: &a [*a]", "model: &m {model: *m}", "data: &d {cleaning: *d}", "<<: 1", "<<: [1]", "seed: &x 1\ntrain: {steps: *y}",
    "\n".join(["a: &a [x,x,x,x,x,x,x,x,x]", *(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]"
                                              for before, name in itertools.pairwise("abcdefghi")), "seed: *i"]),
    # keys
    "? [1, 2]\n: 3", "? {a: b}\n: 3", "1: 2", "null: 1", "true: 1", "2001-99-99: 1", "seed : : 1", "seed: 1\nseed: 1",
    "model: {num_layers: 1, num_layers: 1}", "model:\nmodel:", "model:\n\tx: 1",
    # scalars
    "seed: 2001-99-99", "seed: 2001-01-01", "seed: 1:99:99", "seed: 0o9", "seed: 0b2", "seed: 0x", "seed: =",
    "seed: " + "9" * 5000, "run_dir: \"\\ud800\"", "run_dir: \"\\0\"", "run_dir: \"a\\nb\"", "seed: |\n  a\n  b", "seed: \x00",
    # tags
    "seed: !!int x", "seed: !!float x", "seed: !!bool x", "seed: !!timestamp x", "seed: !!binary é", "seed: !!null x",
    "seed: !x y", "seed: !!set {a}", "seed: !!omap [a: 1]", "seed: !!pairs [a]", "seed: !!python/object/apply:os.getcwd []",
    # depth
    "seed: " + "[" * 2000, "seed: " + "{a: " * 1500, "a: " * 500, "- " * 2000 + "1",
    # documents and characters
    "%YAML 9.9\n---\nseed: 1", "---\nseed: 1\n---\nseed: 2", "\ufeffseed: 1", "\x85", "\u2028", "\t", "'", '"', "[", "}",
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
    text = yaml.safe_dump(draw(nested(st.lists(assignments(odd=True), max_size=4))), allow_unicode=draw(st.booleans()),
                          default_flow_style=draw(st.sampled_from([None, True, False])))
    if kind == "mixed":
        text += draw(st.sampled_from(SNIPPETS))
    if kind == "broken":
        where = draw(st.integers(0, len(text)))
        new = draw(st.text(max_size=3) | st.sampled_from(["\n", "\t", ": ", "- ", "&a ", "*a", "!!", "#"]))
        text = text[:where] + new + text[where + draw(st.integers(0, 9)):]
    return text.encode(errors="surrogatepass")


def as_override(assignment: tuple[str, Any]) -> str:
    name, value = assignment
    if isinstance(value, str):
        return f"{name}={value}"  # as typed
    return f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)).strip()}"


OVERRIDES = st.lists(
    assignments(odd=True).map(as_override) | st.text(max_size=20) | misspelt()
    | st.tuples(st.sampled_from(sorted(KEYS)), st.sampled_from(SNIPPETS) | st.text(max_size=9)).map("=".join), max_size=2)
RUN_FILES = st.tuples(run_texts(), OVERRIDES)


def check_run_file(world: World, example: tuple[bytes, list[str]]) -> int:
    """It is read as settings, or refused in one line that names the file or a key. Settings survive being written
    and read."""
    content, overrides = example
    path = world.folder / "random.yaml"
    path.write_bytes(content)
    found: list[Settings] = []
    ending = call(lambda: found.append(config.load(path, overrides)))
    if ending.code:
        named = [str(path), *KEYS, *SECTIONS, *(" ".join(override.partition("=")[0].split()) for override in overrides)]
        assert ending.code == 2 and any(name in ending.line for name in named), ending
    else:
        path.write_text(dump(found[0]), encoding="utf-8")
        assert call(lambda: found.append(config.load(path))).code == 0 and found[0] == found[1]
    return ending.code


# ---------------------------------------------------------------------------------------------------------------- plans

SIZES = st.integers(0, 33).map(str) | st.sampled_from(["4", "8", "16", "999999999999999999999", "1000000", "00", "-1", "٣", "²"])
TARGETS = st.sampled_from(["cpu:1", "cpu:8", "v5p:4x4x4", "v4-8", "v5litepod-16", "2xv5e:16x16", "h100:8x4", "b200:8x1",
                           "tpu7x:2x2x1"])
ODD_TARGETS = st.one_of(
    st.builds(lambda islands, kind, separator, sizes: f"{islands}{kind}{separator}{'x'.join(sizes)}",
              st.sampled_from(["", "", "2x", "0x", "99999999x"]),
              st.sampled_from(["cpu", "v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "h200", "b200", "v5litepod", "x"]),
              st.sampled_from([":", ":", ":", "-", ""]), st.lists(SIZES, max_size=4)),
    st.text(max_size=10))
HOW = st.sampled_from([*[("--fast",)] * 3, *[("--fast", "--json")] * 3, ("--explain",)])
POWERS = st.sampled_from([1, 1, 2, 4, 8, 16, 3])
# What decides how a run is laid out, mostly with values that fit each other.
LAYOUTS = {
    "model.family": st.sampled_from(["gpt", "bert"]), "model.num_layers": POWERS, "model.num_heads": POWERS,
    "model.num_kv_heads": POWERS | st.none(), "model.hidden_size": st.sampled_from([16, 48, 64, 256, 4096]),
    "model.num_experts": st.sampled_from([None, 4, 8]), "data.global_batch_size": st.sampled_from([8, 64, 512, 12288]),
    "data.sequence_length": st.sampled_from([16, 32]), "train.gradient_accumulation": POWERS,
    "train.precision": st.sampled_from(["float32", "bfloat16"]), "train.remat": st.sampled_from(["none", "dots", "full"]),
    "optimizer.name": st.sampled_from(["adamw", "lion", "adafactor", "sgd", "lamb", "muon"]), "mesh.data": st.just(-1),
    **dict.fromkeys(["mesh.fsdp", "mesh.tensor", "mesh.context", "mesh.stage", "mesh.expert"], POWERS),
}
CHANGES = st.lists(st.sampled_from(sorted(LAYOUTS)).flatmap(lambda name: st.tuples(st.just(name), LAYOUTS[name])), max_size=8)
LARGE_BATCH = ("data.global_batch_size", 512)
COMPILED = st.tuples(nested(CHANGES.map(lambda fitting: [LARGE_BATCH, *fitting])), st.just("cpu:8"), st.just(()))
PLANS = st.tuples(
    nested(st.builds(lambda fitting, other: [LARGE_BATCH, *fitting, *other],
                     CHANGES, st.lists(assignments(odd=False), max_size=1))),
    st.sampled_from([TARGETS] * 4 + [ODD_TARGETS]).flatmap(lambda targets: targets), HOW)


def check_plan(world: World, example: tuple[dict[str, Any], str, tuple[str, ...]]) -> int:
    """There is a plan, or one line; nothing is written."""
    values, target, how = example
    path = world.folder / "random.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    before = tree(world.folder)
    ending = command("plan", path, f"--target={target}", *how)
    assert ending.code in (0, 2) and tree(world.folder) == before, ending
    if "--json" in how and ending.code == 0:
        assert "memory_per_device" in json.loads(ending.out, parse_constant=no_number)
    return ending.code


def no_number(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
