"""The reader and the writer of safetensors against files made by hand, and against the library where it is
installed."""

import json

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.interop.safetensors import BLOCK, INDEX, SHORTEST, SINGLE, make_files, open_weights, plan_shards, read_header

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "BOOL": np.bool_}


def write_file(path, arrays, change=lambda header: header, tail=b"", text=None):
    """A file as the format says, from {name: (dtype, array)}; `change` edits the header, `text` replaces it."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, array) in arrays.items():
        assert array.dtype == DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    written = json.dumps(change(header)).encode() if text is None else text
    path.write_bytes(len(written).to_bytes(8, "little") + written + body + tail)
    return path


def whole(tensor):
    into = np.empty(tensor.matrix, np.float32)
    tensor.read(into, (0, tensor.matrix[0]), (0, tensor.matrix[1]))
    return into.reshape(tensor.shape)


def test_all_types_of_numbers_are_read(tmp_path):
    numbers = np.array([[1.5, -2.25, 0.0], [3.0e4, -0.125, 7.0]])
    bfloat16 = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    path = write_file(tmp_path / SINGLE, {
        "double": ("F64", numbers), "single": ("F32", numbers.astype(np.float32)), "half": ("F16", numbers.astype(np.float16)),
        "brain": ("BF16", bfloat16), "vector": ("F32", np.arange(5, dtype=np.float32)),
        "scalar": ("F32", np.float32(4).reshape(())), "empty": ("F32", np.zeros((0, 3), np.float32)),
        "positions": ("I64", np.arange(4))})
    tensors = read_header(path)
    np.testing.assert_array_equal(whole(tensors["double"]), numbers)
    np.testing.assert_array_equal(whole(tensors["single"]), numbers)
    np.testing.assert_array_equal(whole(tensors["half"]), numbers.astype(np.float16))
    np.testing.assert_array_equal(whole(tensors["brain"]), (bfloat16.astype(np.uint32) << 16).view(np.float32))
    np.testing.assert_array_equal(whole(tensors["brain"])[0], numbers[0])  # short enough for bfloat16
    np.testing.assert_array_equal(whole(tensors["vector"]), np.arange(5))
    assert whole(tensors["scalar"]) == 4 and whole(tensors["empty"]).shape == (0, 3)
    with pytest.raises(UserError, match="weight 'positions' is I64"):
        whole(tensors["positions"])


@pytest.mark.parametrize("columns", [(0, 3000), (100, 2900), (5, 9)], ids=["whole rows", "long parts of rows", "short ones"])
def test_a_part_is_read_into_any_layout(tmp_path, columns):
    """Several blocks; parts of rows that are read on their own, and some that are not worth it; into a transposed
    array."""
    numbers = np.arange(3000 * 2000, dtype=np.float32).reshape(2000, 3000)
    assert 4 * numbers.size > BLOCK and 4 * 2800 > SHORTEST > 16
    tensor = read_header(write_file(tmp_path / SINGLE, {"a": ("F32", np.ones(7, np.float32)), "b": ("F32", numbers)}))["b"]
    for into in (np.empty((1500, columns[1] - columns[0]), np.float32), np.empty((columns[1] - columns[0], 1500), np.float32).T):
        tensor.read(into, (400, 1900), columns)
        np.testing.assert_array_equal(into, numbers[400:1900, slice(*columns)])


def test_shards_of_a_folder_are_one_mapping(tmp_path):
    write_file(tmp_path / "one.safetensors", {"a": ("F32", np.arange(3, dtype=np.float32))})
    write_file(tmp_path / "two.safetensors", {"b": ("F32", np.arange(4, dtype=np.float32))})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    found = {name: whole(tensor).tolist() for name, tensor in open_weights(tmp_path).items()}
    assert found == {"a": [0, 1, 2], "b": [0, 1, 2, 3]}


def test_what_is_written_is_read_again(tmp_path):
    """In three files, since two tensors are more than one may hold; one written in parts, one through a transposed
    view."""
    random = np.random.default_rng(0)
    arrays = {name: random.random(shape, np.float32) for name, shape in (("a", (6, 50)), ("b", (30, 40)), ("c", 9))}
    shards, heads = plan_shards(tmp_path, {name: array.shape for name, array in arrays.items()}, 4 * 1000)
    make_files(tmp_path, shards, heads)
    shards.write("a", arrays["a"][:3, :20], 0, 0)
    shards.write("a", arrays["a"][:3, 20:], 0, 20)
    shards.write("a", arrays["a"][3:], 3)
    shards.write("b", np.ascontiguousarray(arrays["b"].T).T, 0)
    shards.write("c", arrays["c"].reshape(-1, 1), 0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)), INDEX]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 4 * (300 + 1200 + 9)
    for name, tensor in open_weights(tmp_path).items():
        np.testing.assert_array_equal(whole(tensor), arrays[name])
        assert tensor.start % 4 == 0
    library = pytest.importorskip("safetensors")
    for number, name in enumerate("abc", 1):
        with library.safe_open(tmp_path / f"model-0000{number}-of-00003.safetensors", framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            np.testing.assert_array_equal(file.get_tensor(name), arrays[name])


GOOD = {"a": ("F32", np.zeros((2, 3), np.float32)), "b": ("F32", np.ones(4, np.float32))}


def edited(**fields):
    """The header with fields of weight 'b' changed; None leaves one away."""
    def change(header):
        header["b"] = {name: value for name, value in (header["b"] | fields).items() if value is not None}
        return header

    return change


@pytest.mark.parametrize(("options", "message"), [
    ({"change": edited(data_offsets=[24, 400])}, "offsets [24, 400] hold 376"),
    ({"change": edited(shape=[400], data_offsets=[24, 1624])}, "weight 'b' ends at byte"),
    ({"change": edited(data_offsets=[20, 36])}, "weight 'b' overlaps another"),
    ({"change": edited(data_offsets=[28, 44])}, "weight 'b' begins 4 bytes behind"),
    ({"change": edited(data_offsets=[40, 24])}, "hold -16"),
    ({"change": edited(data_offsets=[-8, 8])}, "data_offsets=[-8, 8]; expected numbers that are not negative"),
    ({"change": edited(data_offsets=[24])}, "data_offsets=[24]"),
    ({"change": edited(data_offsets=None)}, "weight 'b': expected data_offsets, dtype, shape"),
    ({"change": edited(shape=[2, 3])}, "takes 24 bytes"),
    ({"change": edited(shape=[True, 4])}, "shape=[True, 4]"),
    ({"change": edited(shape="four")}, "shape='four'"),
    ({"change": edited(shape=[2**62, 2**62])}, "offsets [24, 40] hold 16"),
    ({"change": edited(dtype="F31")}, "dtype='F31'; expected one of F32"),
    ({"change": edited(dtype=["F32"])}, "dtype=['F32']"),
    ({"change": lambda header: header | {"c": 7}}, "weight 'c': expected"),
    ({"change": lambda header: [header]}, "expected a JSON object"),
    ({"tail": b"more"}, "its weights end at"),
    ({"text": b'{"a": 1, "a": 2}'}, "'a' is there twice"),
    ({"text": b"\xff\xfe{}"}, "its header is not JSON"),
    ({"text": b"{" * 5000}, "its header is not JSON"),
])
def test_a_lying_header_is_refused_by_file_and_tensor(tmp_path, options, message):
    path = write_file(tmp_path / SINGLE, GOOD, **options)
    with pytest.raises(UserError) as error:
        open_weights(tmp_path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    b"", b"\x01", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", (200_000_000).to_bytes(8, "little") + b"{}"])
def test_an_absurd_length_of_the_header(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError, match=r"its header is said to have .* bytes, and the file has"):
        open_weights(tmp_path)


@pytest.mark.parametrize("left", [1, 30, 60])
def test_a_file_that_is_cut_short(tmp_path, left):
    path = write_file(tmp_path / SINGLE, GOOD)
    path.write_bytes(path.read_bytes()[:-left] if left < 60 else path.read_bytes()[:left])
    with pytest.raises(UserError, match="cut short"):
        open_weights(tmp_path)


def test_a_file_that_is_cut_after_it_was_opened(tmp_path):
    tensor = read_header(write_file(tmp_path / SINGLE, GOOD))["b"]
    with open(tmp_path / SINGLE, "r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    with pytest.raises(UserError, match="the file ends before its last byte"):
        whole(tensor)


@pytest.mark.parametrize(("weight_map", "message"), [
    ({"a": "../one.safetensors"}, "expected a file beside the index"),
    ({"a": "/etc/passwd"}, "expected a file beside the index"),
    ({"a": 5}, "is said to be in 5"),
    ({"a": "two.safetensors"}, "two.safetensors: no such file; model.safetensors.index.json says that it holds weight 'a'"),
    ({"a": "one.safetensors", "z": "one.safetensors"}, "weight 'z' is not in it"),
    ({}, "weight_map={}"), ([], "weight_map=[]"), (None, "weight_map=None"),
])
def test_a_lying_index(tmp_path, weight_map, message):
    write_file(tmp_path / "one.safetensors", GOOD)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(UserError) as error:
        open_weights(tmp_path)
    assert message in str(error.value)


def test_one_weight_in_two_shards(tmp_path):
    for name in ("one", "two"):
        write_file(tmp_path / f"{name}.safetensors", GOOD)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(UserError, match=r"weight 'a' is also in one\.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize(("names", "message"), [
    (["pytorch_model.bin"], "only safetensors are read. Convert it where you trust it: python -c"),
    (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "save_pretrained"),
    (["model.pt"], "save_pretrained"), (["tf_model.h5"], "from_tf=True"), (["flax_model.msgpack"], "from_flax=True"),
    (["llama.Q4_K_M.gguf"], "gguf_file='llama.Q4_K_M.gguf'"),
    (["adapter_model.safetensors", "adapter_config.json"], "an adapter (PEFT)"),
    (["weights.safetensors"], "there is weights.safetensors: give it that name"),
    (["config.json"], "no model.safetensors"),
])
def test_other_weights_are_refused_with_the_way_out(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x04}.")
    with pytest.raises(UserError) as error:
        open_weights(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
