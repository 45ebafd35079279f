import importlib.util

import pytest

from eabf_jax.errors import InputError
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.topology import SLICES, compile_only_devices, tpu_slice


@pytest.mark.parametrize(
    ("name", "chips", "shape", "links"),
    [
        # as the cloud's documentation lists them; 2 x 2 x 1: each chip has one neighbour along two dimensions
        ("v4-8", 4, (2, 2, 1), 2),
        ("v4-32", 16, (2, 2, 4), 3),
        ("v4-128", 64, (4, 4, 4), 6),
        ("v4-512", 256, (4, 8, 8), 6),
        ("v5p-16", 8, (2, 2, 2), 3),
        ("v5litepod-8", 8, (2, 4), 2),
        ("v6e-256", 256, (16, 16), 4),
    ],
)
def test_slices_have_the_clouds_names_and_shapes(name, chips, shape, links):
    found = tpu_slice(name)
    assert (found.chips, found.shape, found.links) == (chips, shape, links)


def test_an_unknown_slice_is_named_with_the_nearest():
    with pytest.raises(InputError, match="unknown TPU slice 'v4-33': did you mean 'v4-32'"):
        tpu_slice("v4-33")


def test_the_tpu_compiler_knows_every_slice():
    kinds = {"v4": "TPU v4", "v5p": "TPU v5", "v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}
    for slice_ in SLICES.values():
        devices = compile_only_devices(slice_)
        assert len(devices) == slice_.chips
        assert {device.device_kind for device in devices} == {kinds[slice_.generation]}
        corner = [max(device.coords[i] for device in devices) + 1 for i in range(len(slice_.shape))]
        assert tuple(corner) == slice_.shape


@pytest.mark.parametrize(
    "config", [MeshConfig(fsdp=2, context=32), MeshConfig(fsdp=16, context=4), MeshConfig(tensor=8)]
)
def test_a_mesh_need_not_follow_the_dimensions_of_the_torus(config):
    mesh = make_mesh(config, compile_only_devices(tpu_slice("v4-128")))
    assert mesh.size == 64 and len(set(mesh.devices.flat)) == 64


def test_a_missing_compiler_is_one_line_that_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest)
    )
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match="pip install libtpu"):
        compile_only_devices(tpu_slice("v4-8"))
