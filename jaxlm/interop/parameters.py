"""Parameters on a mesh from the tensors of a folder, and back: each process handles only what its devices hold, a
block at a time."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.errors import UserError, nearest
from jaxlm.interop.configuration import Foreign
from jaxlm.interop.families import Family
from jaxlm.interop.names import head_names, plain_names, shown_names
from jaxlm.interop.safetensors import BLOCK, Range, Shards, Tensor
from jaxlm.interop.weights import Index, Weight
from jaxlm.parallel.layout import Layout

THREADS = 4  # that read or write at a time, each a block
ALIGNED = 64  # bytes: what JAX takes over without a copy on the CPU


Piece = tuple[str, np.ndarray, Range, Range]


class Parameter(NamedTuple):
    """One array of the model's tree, and where it is in the files."""

    path: str
    shape: tuple[int, ...]  # on the mesh: layers first where it is stacked, the vocabulary padded
    axes: tuple[str | None, ...]
    weight: Weight | None  # None: transformers has none, all zeros
    vocab_size: int

    @property
    def stacked(self) -> bool:
        return self.axes[:1] == ("layers",)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of one layer, without the rows that pad the vocabulary."""
        own = self.shape[1:] if self.stacked else self.shape
        axes = self.axes[1:] if self.stacked else self.axes
        return tuple(self.vocab_size if axis == "vocab" else size for size, axis in zip(own, axes, strict=True))

    def names(self, layer_order: Sequence[int]) -> list[str]:
        """The tensor of each slot of the stack; one where it is not stacked."""
        if self.weight is None:
            return []
        if not self.stacked:
            return [self.weight.name]
        first, name = self.weight.first_layer, self.weight.name
        return [name.format(layer) for layer in layer_order if layer >= first]

    def pieces(self, array: np.ndarray, index: Index, layer_order: Sequence[int]) -> Iterator[Piece]:
        """(tensor, view, rows, columns) of every tensor that a shard takes part in: the view is the shard's own memory,
        in the tensor's order. Rows that only pad the vocabulary are in none."""
        slots = range(*index[0].indices(self.shape[0])) if self.stacked else [0]
        inner = index[1:] if self.stacked else index
        inner = tuple(slice(*(min(edge, size) for edge in each.indices(whole)[:2]))
                      for each, size, whole in zip(inner, self.sizes, self.shape[self.stacked:], strict=True))
        kept = tuple(slice(each.stop - each.start) for each in inner)
        for place, slot in enumerate(slots):
            layer = int(layer_order[slot]) if self.stacked else 0
            if self.stacked and layer < self.weight.first_layer:
                continue
            own = (array[place] if self.stacked else array)[kept]
            if own.size:
                yield self.weight.name.format(layer), self.weight.view(own), *self.weight.place(inner, self.sizes)


def parameters(foreign: Foreign, shapes: Mapping[str, Sequence[int]], axes: Mapping[str, Sequence[str | None]]
               ) -> dict[str, Parameter]:
    """Every parameter by its dotted path, and where transformers' model has it. Raises UserError for one that it has
    not."""
    family, model, found = foreign.family, foreign.model, {}
    for path, shape in shapes.items():
        try:
            weight = family.weight(path, model.first_norm, foreign.pad_token)
        except KeyError:
            raise UserError(f"parameter {path}: transformers' {family.model_type} has none like it") from None
        if path in family.twins and not model.tied_embeddings:
            weight = weight._replace(name=family.twins[path])  # the class reads that one, where it is not tied to the other
        found[path] = Parameter(path, tuple(shape), tuple(axes[path]), weight, model.vocab_size)
    return found


def parameters_of(foreign: Foreign, layout: Layout) -> dict[str, Parameter]:
    """The same of what is laid out on a mesh."""
    shapes = {path: leaf.shape for path, leaf in by_path(layout.shapes).items()}
    return parameters(foreign, shapes, {path: leaf.names for path, leaf in by_path(layout.axes).items()})


def by_path(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by their dotted path."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= by_path(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def as_tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `by_path`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *folders, last = path.split(".")
        functools.reduce(lambda node, name: node.setdefault(name, {}), folders, tree)[last] = value
    return tree


# ---- reading ---------------------------------------------------------------------------------------------------------

class Found(NamedTuple):
    """What a folder has of a model's parameters, all names and shapes checked."""

    parameters: dict[str, Parameter]  # those that are there, by path
    tensors: dict[str, Tensor]  # by the names of today
    missing: list[str]  # paths of heads that the folder does not have
    notes: list[str]  # what is left out or changed, a line each

    def load(self, path: str, sharding: jax.sharding.Sharding, order: Sequence[int]) -> jax.Array:
        """The array on its devices. Each process reads what its devices hold, shards that are the same once; on the
        CPU the memory that was read into is the array's own. `order`: the layer of each slot of a stacked array."""
        parameter = self.parameters[path]
        indices = sharding.addressable_devices_indices_map(parameter.shape)
        devices: dict[tuple, list] = {}
        for device, index in indices.items():
            spans = tuple(each.indices(size)[:2] for each, size in zip(index, parameter.shape, strict=True))
            devices.setdefault(spans, []).append(device)
        arrays = {}
        for spans, holders in devices.items():
            shard = _aligned([last - first for first, last in spans])
            _fill(parameter, shard, tuple(slice(*span) for span in spans), self.tensors, order)
            for device in holders:
                arrays[device] = jax.device_put(shard, device)
        return jax.make_array_from_single_device_arrays(parameter.shape, sharding, [arrays[device] for device in indices])


def find_parameters(foreign: Foreign, tensors: Mapping[str, Tensor], wanted: Mapping[str, Parameter], needed: Sequence[str]
                    ) -> Found:
    """Where the parameters are in a folder.

    Args:
      foreign: what config.json says.
      tensors: of the folder, as the files name them (`open_weights`).
      wanted: the model's parameters.
      needed: heads that must be whole; the parameters of others may be missing.

    Raises UserError, naming the tensor: it is missing, has another shape, or belongs to nothing.
    """
    layers = range(foreign.model.num_layers)
    names = {path: parameter.names(layers) for path, parameter in wanted.items()}
    tensors, buffers = plain_names(foreign.family, tensors, {name for each in names.values() for name in each})
    notes = [f"{shown_names(buffers)} not taken over: masks and numbers that are computed"] if buffers else []
    resolve_copies(foreign, tensors)
    missing = [path for path in wanted if _may_be_fresh(path, needed) and any(name not in tensors for name in names[path])]
    there = {path: parameter for path, parameter in wanted.items() if path not in missing}
    expected = {name for path in there for name in names[path]}
    notes += _check_names(foreign.family, tensors, expected, foreign.model.num_layers)
    for path, parameter in there.items():
        for name in names[path]:
            shape = parameter.weight.file_shape(parameter.sizes)
            if tensors[name].shape != shape:
                raise UserError(f"{tensors[name].file}: weight '{name}' has shape {list(tensors[name].shape)}; expected "
                                f"{list(shape)} by config.json")
    narrow = sorted({tensors[name].dtype for name in expected} - {"F32"})
    notes += [f"{', '.join(narrow)}: held as float32 from here on"] if narrow else []
    return Found(there, tensors, missing, notes)


def _may_be_fresh(path: str, needed: Sequence[str]) -> bool:
    return path.startswith("heads.") and path.split(".")[1] not in needed


def resolve_copies(foreign: Foreign, tensors: dict[str, Tensor]) -> None:
    """Takes second copies out of `tensors`, after a look whether they are copies. Raises UserError for those that are
    none."""
    family, tied = foreign.family, foreign.model.tied_embeddings
    table = family.weight("token_embedding.embedding").name
    pairs = []
    if tied:
        outputs = [path for path in family.names if path in ("heads.next_token", "heads.masked_token.table.embedding")]
        pairs += [(family.weight(f"{path.removesuffix('.embedding')}.embedding").name, table) for path in outputs]
    for path, second in family.twins.items():
        first = family.weight(path).name
        pairs += [(second, first) if tied else (first, second)]
    for copy, original in pairs:
        found = tensors.pop(copy, None)
        if found is None:
            continue
        kept = tensors.setdefault(original, found)
        if kept is not found and (tied or original == table) and not _same(found, kept):
            raise UserError(f"{found.file}: weight '{found.name}' differs from '{kept.name}', and tie_word_embeddings is true in "
                            "config.json; it must be false for these weights")


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    if first.shape != second.shape:
        return False
    rows, width = first.matrix
    step = max(1, BLOCK // max(1, 4 * width))
    for start in range(0, rows, step):
        span = (start, min(rows, start + step))
        one, other = (np.empty((span[1] - span[0], width), np.float32) for _ in range(2))
        first.read(one, span, (0, width))
        second.read(other, span, (0, width))
        if not np.array_equal(one, other, equal_nan=True):
            return False
    return True


def _check_names(family: Family, tensors: Mapping[str, Tensor], expected: set[str], layers: int) -> list[str]:
    """Raises UserError for a tensor that is missing, or belongs to nothing; a line for those of heads that the model
    has not."""
    missing, others = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing:
        where = next(iter(tensors.values())).file.parent if tensors else "the folder"
        raise UserError(f"{where}: weight {shown_names(missing)}: missing{nearest(missing[0], others)}")
    heads = [name for name in others if name in head_names(family)]
    strange = [name for name in others if name not in heads]
    if strange:
        given, file = shown_names([tensors[name].name for name in strange]), tensors[strange[0]].file
        raise UserError(f"{file}: weight {given}: no place for it in a {family.model_type} of {layers} layers")
    return [f"{shown_names(heads)} left out: of a head that this model does not have"] if heads else []


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Reading, writing and copying let go of the interpreter's lock. Always the same: each thread keeps some memory."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="tensors")


def _fill(parameter: Parameter, shard: np.ndarray, index: Index, tensors: Mapping[str, Tensor], order: Sequence[int]) -> None:
    if parameter.weight is not None:
        if parameter.weight.first_layer:  # layers that have no such norm
            shard[...] = 1.0 if parameter.path.endswith("scale") else 0.0
        list(_threads().map(lambda piece: tensors[piece[0]].read(*piece[1:]), parameter.pieces(shard, index, order)))


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """float32 zeros, in memory that JAX can take over."""
    size = 4 * int(np.prod(shape))
    memory = np.zeros(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + size].view(np.float32).reshape(shape)


# ---- writing ---------------------------------------------------------------------------------------------------------

def file_shapes(wanted: Mapping[str, Parameter], order: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Tensors of an export by name, in the order of the layers."""
    whole = {name: parameter.weight.file_shape(parameter.sizes) for parameter in wanted.values() if not parameter.stacked
             for name in parameter.names(order)}
    stacked = [parameter for parameter in wanted.values() if parameter.stacked]
    return whole | {parameter.weight.name.format(layer): parameter.weight.file_shape(parameter.sizes)
                    for layer in sorted(order) for parameter in stacked
                    if parameter.weight and layer >= parameter.weight.first_layer}


def write_parameters(wanted: Mapping[str, Parameter], params: Mapping[str, jax.Array], shards: Shards, order: Sequence[int],
                     twins: Mapping[str, str] = {}) -> None:
    """Every process writes what it is the first to hold. `twins`: tensor -> a second one for the same numbers.

    Raises UserError: the model has a number where transformers' has none.
    """
    def write(piece: Piece) -> None:
        name, view, rows, columns = piece
        for each in (name, *([twins[name]] if name in twins else [])):
            shards.write(each, view, rows[0], columns[0])

    for path, parameter in wanted.items():
        for shard in params[path].addressable_shards:
            if shard.replica_id:
                continue
            array = np.asarray(shard.data)
            if parameter.weight is None:
                if array.any():
                    raise UserError(f"parameter {path}: transformers' class has none, and it is not 0 here")
                continue
            list(_threads().map(write, parameter.pieces(array, shard.index, order)))


