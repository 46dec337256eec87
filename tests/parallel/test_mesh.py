import pytest

from flax_pref.parallel.hosts import join
from flax_pref.parallel.mesh import TRAINING_AXES, make_mesh


class Device(int):
    """A mesh looks at its devices only when it is used."""

    platform = device_kind = "cpu"


DEVICES = [Device(i) for i in range(6)]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=-1", {"data": 6}),
        ("network=3,data=-1", {"network": 3, "data": 2}),
        ("data=2, network=3", {"data": 2, "network": 3}),
        ("network=-1", {"network": 6}),
    ],
)
def test_a_mesh_takes_all_devices_that_there_are(text, shape):
    assert dict(make_mesh(text, DEVICES).shape) == shape


def test_neighbours_on_the_last_axis_are_neighbours_however_the_mesh_is_written():
    """Devices come host by host: data goes across hosts, and tensor not."""
    for text in ("data=-1,fsdp=1,tensor=3", "tensor=3,fsdp=1,data=2"):
        mesh = make_mesh(text, DEVICES, TRAINING_AXES)
        assert mesh.axis_names == TRAINING_AXES
        assert mesh.devices.tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=0", "data=-2", "rows=6", "data=-1,data=6", "data=-1,network=-1", "data=4", "network=4,data=-1"],
)
def test_a_mesh_that_cannot_be_made_is_refused_with_one_that_could(text):
    with pytest.raises(ValueError, match=r"expected sizes of data and network such as data=-1 or network=2,data=-1"):
        make_mesh(text, DEVICES)


def test_axes_that_a_program_has_no_use_for_are_refused():
    with pytest.raises(ValueError, match="'fsdp=2' is not understood; expected sizes of data and network"):
        make_mesh("data=-1,fsdp=2", DEVICES)
    with pytest.raises(ValueError, match="'network=2' is not understood; expected sizes of data, fsdp and tensor"):
        make_mesh("data=-1,network=2", DEVICES, TRAINING_AXES)


def test_a_program_of_one_process_joins_nobody():
    assert join(None) == (0, 1)
    for text in ("", "4,0", "host:12,2,2", "host,2,0"):
        with pytest.raises(
            ValueError, match=r"expected auto, or ADDRESS:PORT,PROCESSES,NUMBER as in 10.0.0.2:1234,4,0"
        ):
            join(text)
