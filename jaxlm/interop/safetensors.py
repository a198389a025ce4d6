"""Weights in safetensors files: read a piece at a time, whatever their size, and written by all processes of a run.

    8 bytes     length N of the header, little-endian
    N bytes     JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, stop]}, "__metadata__": ...}
    the rest    the numbers, row by row

A folder has one file, model.safetensors, or several and model.safetensors.index.json, which says what is in which.
The `safetensors` package is not used: it maps a file into memory, where every page that was read counts as the
process's own; its NumPy arrays know no bfloat16; it writes arrays only whole; and it does not name the tensor that
is wrong.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from jaxlm.errors import UserError, nearest, shown
from jaxlm.storage.files import Location, exists, file_size, names_in, open_bytes, read_bytes, read_range, write_json
from jaxlm.storage.remote import is_remote

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; what the format allows
# bytes of an element. The first four are read; the others are there, in what is not read: position numbers, masks
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1,
         "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
READ = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
BLOCK = 2**20  # bytes read or written at a time
SQUARE = 64  # numbers on a side, of which two fit a processor's nearest cache
SHORTEST = 2**12  # bytes of a part of a row that is worth a read of its own
Range = tuple[int, int]  # first and behind the last


class Tensor(NamedTuple):
    """One tensor of a file: where its bytes lie, and what they are."""

    file: Location
    name: str
    dtype: str  # as the file has it: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def matrix(self) -> tuple[int, int]:
        """Its shape as rows of numbers that lie together; a vector is one column."""
        return (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)

    def read(self, into: np.ndarray, rows: Range, columns: Range = (0, 1)) -> None:
        """Copies a part of the matrix to float32 `into` [rows, columns], which need not be contiguous, a block at a
        time. Raises UserError: the dtype is none that weights have, or the file has become shorter."""
        if self.dtype not in READ:
            raise UserError(f"{self.file}: weight '{self.name}' is {self.dtype}; expected one of {', '.join(READ)}")
        with open_bytes(self.file) as file:
            if self.dtype == "F32" and into.flags.c_contiguous and columns == (0, self.matrix[1]) and into.size:
                self._fill(file, into, rows[0], 0)
                return
            for place, block in self._blocks(file, rows, columns):
                _copy(_as_numbers(block, self.dtype), into[place : place + len(block)])

    def _blocks(self, file: IO[bytes], rows: Range, columns: Range) -> Iterator[tuple[int, np.ndarray]]:
        """(row of the part, block of it), in the file's numbers."""
        width, size = self.matrix[1], SIZES[self.dtype]
        own = columns[1] - columns[0]
        apart = own < width and own * size >= SHORTEST and not is_remote(self.file)
        step = max(1, BLOCK // max(1, size * (own if apart else width)))
        for first in range(rows[0], rows[1], step):
            count = min(step, rows[1] - first)
            block = np.empty((count, own if apart else width), READ[self.dtype])
            parts = [(first + row, columns[0], block[row]) for row in range(count)] if apart else [(first, 0, block)]
            for row, column, part in parts:
                self._fill(file, part, row, column)
            yield first - rows[0], block if apart else block[:, columns[0] : columns[1]]

    def _fill(self, file: IO[bytes], into: np.ndarray, row: int, column: int) -> None:
        """The numbers from there on, as the file has them, into a contiguous array."""
        file.seek(self.start + (row * self.matrix[1] + column) * SIZES[self.dtype])
        if file.readinto(into.reshape(-1).view(np.uint8)) != into.nbytes:
            raise UserError(f"{self.file}: weight '{self.name}': the file ends before its last byte")


def _as_numbers(block: np.ndarray, dtype: str) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (block.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else block


def _copy(source: np.ndarray, into: np.ndarray) -> None:
    """Between a matrix and a transposed one square by square, which is four times as fast as row by row."""
    if source.strides[0] > source.strides[1] and into.strides[0] > into.strides[1]:
        into[...] = source
        return
    for row in range(0, len(source), SQUARE):
        for column in range(0, source.shape[1], SQUARE):
            square = slice(row, row + SQUARE), slice(column, column + SQUARE)
            into[square] = source[square]


# ---- reading ---------------------------------------------------------------------------------------------------------

def open_weights(folder: Location) -> dict[str, Tensor]:
    """Every tensor of a folder by its name; only headers are read. Raises UserError for a file that is not what the
    format says, and for a folder without safetensors."""
    if exists(folder / SINGLE):
        return read_header(folder / SINGLE)
    if not exists(folder / INDEX):
        raise UserError(_no_weights(folder))
    named = _read_index(folder / INDEX)
    found: dict[str, Tensor] = {}
    for name in sorted(set(named.values())):
        for tensor in read_header(folder / name).values():
            if tensor.name in found:
                raise UserError(f"{folder / name}: weight '{tensor.name}' is also in {found[tensor.name].file.name}")
            found[tensor.name] = tensor
    for weight, name in named.items():
        if weight not in found or found[weight].file.name != folder.joinpath(name).name:
            raise UserError(f"{folder / name}: weight '{weight}' is not in it; {INDEX} says so")
    return found


def _read_index(path: Location) -> dict[str, str]:
    """Weight -> file of the same folder. Raises UserError."""
    content = read_json(path)
    named = content.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{path}: weight_map={shown(named)}: expected a mapping from weights to files")
    for weight, name in named.items():
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise UserError(f"{path}: weight '{weight}' is said to be in {shown(name)}; expected a file beside the index")
        if not exists(path.parent / name):
            raise UserError(f"{path.parent / name}: no such file; {INDEX} says that it holds weight '{weight}'"
                            f"{nearest(name, names_in(path.parent))}")
    return named


def read_json(path: Location) -> dict[str, Any]:
    """A JSON object, no key twice. Raises UserError."""
    try:
        content = json.loads(read_bytes(path).decode(), object_pairs_hook=_once)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; expected a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {shown(content)}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON readers take the last of two; which one was meant nobody knows."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' is there twice")
        found[name] = value
    return found


def read_header(path: Location) -> dict[str, Tensor]:
    """The tensors of one file. Raises UserError, naming file and tensor, for whatever the header and the file's size
    contradict."""
    size = file_size(path)
    length = int.from_bytes(read_range(path, 0, 8), "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
        raise UserError(f"{path}: its header is said to have {length:,} bytes, and the file has {size:,}; it is cut short, or no "
                        "safetensors file")
    try:
        header = json.loads(read_range(path, 8, 8 + length).decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is {shown(header)}; expected a JSON object")
    header.pop("__metadata__", None)
    stops: dict[str, int] = {}
    tensors = {}
    for name, about in header.items():
        tensors[name], stops[name] = _tensor(path, name, about, 8 + length)
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, stops[tensor.name])):
        if tensor.start != end:
            gap = tensor.start - end
            raise UserError(f"{path}: weight '{tensor.name}' "
                            + (f"begins {gap:,} bytes behind the one before it" if gap > 0 else "overlaps another"))
        end = stops[tensor.name]
        if end > size:
            raise UserError(f"{path}: weight '{tensor.name}' ends at byte {end:,}, and the file has {size:,}; it is cut short")
    if end != size:
        raise UserError(f"{path}: the file has {size:,} bytes, and its weights end at {end:,}")
    return tensors


def _tensor(path: Location, name: str, about: Any, begin: int) -> tuple[Tensor, int]:
    """A tensor, and the byte of the file behind it; `begin`: where the numbers begin."""
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(about, dict) or about.keys() != fields:
        raise UserError(f"{path}: weight '{name}': expected {', '.join(sorted(fields))}, found {shown(about)}")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise UserError(f"{path}: weight '{name}': dtype={shown(dtype)}; expected one of {', '.join(SIZES)}"
                        f"{nearest(str(dtype), SIZES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        what = f"data_offsets={shown(offsets)}" if _are_sizes(shape) else f"shape={shown(shape)}"
        raise UserError(f"{path}: weight '{name}': {what}; expected numbers that are not negative")
    if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
        needed = shown(math.prod(shape) * SIZES[dtype])
        raise UserError(f"{path}: weight '{name}': {dtype} {shown(shape)} takes {needed} bytes, and its offsets {shown(offsets)} "
                        f"hold {shown(offsets[1] - offsets[0])}")
    return Tensor(path, name, dtype, tuple(shape), begin + offsets[0]), begin + offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


WAYS_OUT = {  # what other files there are -> arguments with which transformers reads them
    ".bin": "", ".pt": "", ".pth": "", ".ckpt": "", ".h5": ", from_tf=True", ".msgpack": ", from_flax=True",
    ".gguf": ", gguf_file='{name}'"}


def _no_weights(folder: Location) -> str:
    """Why there is nothing to read, and the way out."""
    names = names_in(folder)
    for suffix, argument in WAYS_OUT.items():
        name = next((name for name in names if name.endswith(suffix) and name != "training_args.bin"), None)
        if name:
            command = (f"python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{folder}'"
                       f"{argument.format(name=name)}).save_pretrained('{folder}-safetensors')\"")
            return (f"{folder}: its weights are in {name}, which may hold code or is of another program; only safetensors are "
                    f"read. Convert it where you trust it: {command} (AutoModelForCausalLM, ... with its head), and copy the "
                    "tokenizer's files")
    if "adapter_model.safetensors" in names:
        return f"{folder}: an adapter (PEFT), no model; merge it first: model.merge_and_unload().save_pretrained(...)"
    other = next((name for name in names if name.endswith(".safetensors")), None)
    if other:
        return f"{folder}: no {SINGLE} and no {INDEX}; there is {other}: give it that name, if it is the whole model"
    return f"{folder}: no {SINGLE}; expected a folder that transformers has saved"


# ---- writing ---------------------------------------------------------------------------------------------------------

class Shards(NamedTuple):
    """Files of float32 tensors that are there, full of zeros, for every process to write its parts into."""

    tensors: Mapping[str, Tensor]

    def write(self, name: str, part: np.ndarray, row: int, column: int = 0) -> None:
        """Puts float32 `part` [rows, columns] at its place in the matrix of a tensor; a block is copied at a time."""
        tensor = self.tensors[name]
        width = tensor.matrix[1]
        with open(tensor.file, "r+b") as file:
            step = max(1, BLOCK // max(1, 4 * part.shape[1]))
            for first in range(0, len(part), step):
                block = np.empty((min(step, len(part) - first), part.shape[1]), "<f4")
                _copy(part[first : first + step], block)
                pieces = [block] if part.shape[1] == width else block
                for number, piece in enumerate(pieces):
                    file.seek(tensor.start + ((row + first + number) * width + column) * 4)
                    file.write(piece.data)


def plan_shards(folder: Location, shapes: Mapping[str, Sequence[int]], most: int) -> tuple[Shards, dict[str, bytes]]:
    """Which tensor (name -> shape, float32) goes where: files of at most `most` bytes of numbers, but for a tensor that
    is larger. And the head of each file: every process plans the same, one of them makes the files."""
    groups: list[dict[str, Sequence[int]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if groups[-1] and filled + size > most:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    tensors, heads = {}, {}
    for number, group in enumerate(groups, 1):
        file = folder / (SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors")
        heads[file.name], starts = _header(group)
        tensors |= {name: Tensor(file, name, "F32", tuple(shape), starts[name]) for name, shape in group.items()}
    return Shards(tensors), heads


def _header(shapes: Mapping[str, Sequence[int]]) -> tuple[bytes, dict[str, int]]:
    """Of a file of float32 tensors, and the byte at which each begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for name, shape in shapes.items():
        stop = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    starts = {name: 8 + len(text) + about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, starts


def make_files(folder: Location, shards: Shards, heads: Mapping[str, bytes]) -> None:
    """The files at their full size, and the index where there are several."""
    sizes = dict.fromkeys(heads, 0)
    for tensor in shards.tensors.values():
        sizes[tensor.file.name] = max(sizes[tensor.file.name], tensor.start + 4 * math.prod(tensor.shape))
    for name, head in heads.items():
        with open(folder / name, "wb") as file:
            file.write(head)
            file.truncate(max(sizes[name], len(head)))
    if len(heads) > 1:
        total = sum(4 * math.prod(tensor.shape) for tensor in shards.tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total},
                                    "weight_map": {name: tensor.file.name for name, tensor in shards.tensors.items()}})
