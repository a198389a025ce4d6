"""Programs that were compiled before: found by what they were made of, refused when damaged."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.runtime.executables import load, save


@pytest.fixture
def program(meshes):
    mesh = meshes["fsdp8"]
    here = NamedSharding(mesh, PartitionSpec("fsdp"))
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=here)

    def lowered(factor):
        return jax.jit(lambda tree: {"x": factor * tree["x"] + tree["x"].sum()}, donate_argnums=0).lower({"x": shape})

    return mesh, here, lowered


def test_what_was_compiled_runs_without_compiling(program, tmp_path):
    mesh, here, lowered = program
    path = save(lowered(2.0).compile(), lowered(2.0), mesh, tmp_path)
    assert [path] == list(tmp_path.iterdir())
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    out = load(lowered(2.0), mesh, tmp_path)({"x": jax.device_put(x, here)})
    np.testing.assert_array_equal(out["x"], 2 * x + x.sum())


def test_another_program_another_mesh_and_a_damaged_file_are_not_taken(program, meshes, tmp_path):
    mesh, _, lowered = program
    path = save(lowered(2.0).compile(), lowered(2.0), mesh, tmp_path)
    assert load(lowered(3.0), mesh, tmp_path) is None
    assert load(lowered(2.0), meshes["2x2x2"], tmp_path) is None
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert load(lowered(2.0), mesh, tmp_path) is None


def test_a_run_of_several_processes_does_not_take_the_program_of_one(program, tmp_path):
    mesh, _, lowered = program

    def of_processes(count):
        devices = [SimpleNamespace(device_kind=device.device_kind, platform=device.platform, process_index=place * count // 8)
                   for place, device in enumerate(mesh.devices.flat)]
        return SimpleNamespace(devices=np.array(devices).reshape(mesh.devices.shape))

    compiled = lowered(2.0).compile()
    alone = save(compiled, lowered(2.0), mesh, tmp_path)
    assert load(lowered(2.0), of_processes(2), tmp_path) is None
    paths = [save(compiled, lowered(2.0), of_processes(count), tmp_path) for count in (1, 2, 4)]
    assert paths[0] == alone and len(set(paths)) == 3
