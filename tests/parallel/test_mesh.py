"""The mesh: the number of devices per axis, and what is refused."""

import jax
import numpy as np
import pytest

from eabf_jax.errors import InputError
from eabf_jax.parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((-1, 1, 2), (4, 1, 2)),
        ((1, 1, -1), (1, 1, 8)),
        ((2, 4, 1), (2, 4, 1)),
        ((8, -1, 1), (8, 1, 1)),
        ((1, -1, 1, 4), (1, 2, 1, 4)),
        ((2, 1, 2, -1), (2, 1, 2, 2)),
    ],
)
def test_axes_take_the_devices_asked_for_or_left(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor", "context")[: len(shape)]) == shape
    assert mesh.size == 8
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in jax.devices())


def test_given_devices_are_used_and_no_others() -> None:
    devices = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}
    assert set(np.ravel(mesh.devices)) == set(devices)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1), (-1, 2, -1)])
def test_axis_sizes_are_positive_and_at_most_one_is_open(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(
        InputError, match=f"mesh data={sizes[0]}, fsdp={sizes[1]}, context=1, tensor={sizes[2]}: .* may be -1"
    ):
        MeshConfig(*sizes)


@pytest.mark.parametrize(("sizes", "found"), [((3, -1, 1), 3), ((4, -1, 4), 16)])
def test_an_open_axis_needs_a_whole_number_of_devices(sizes: tuple[int, int, int], found: int) -> None:
    with pytest.raises(InputError, match=f"axes of {found} devices do not divide the 8 devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(("sizes", "product"), [((2, 2, 1), 4), ((2, 4, 2), 16)])
def test_the_axes_multiply_to_the_number_of_devices(sizes: tuple[int, int, int], product: int) -> None:
    with pytest.raises(InputError, match=f"takes {product} devices; 8 are available"):
        make_mesh(MeshConfig(*sizes))
