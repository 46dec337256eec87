import pytest

from flax_pref.parallel.hosts import join
from flax_pref.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=-1", {"data": 6}),
        ("network=3,data=-1", {"network": 3, "data": 2}),
        ("data=2, network=3", {"data": 2, "network": 3}),
        ("network=-1", {"network": 6}),
    ],
)
def test_a_mesh_takes_all_devices_in_the_order_of_its_axes(text, shape):
    mesh = make_mesh(text, range(6))  # a mesh looks at its devices only when it is used
    assert dict(mesh.shape) == shape


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=0", "data=-2", "rows=6", "data=-1,data=6", "data=-1,network=-1", "data=4", "network=4,data=-1"],
)
def test_a_mesh_that_cannot_be_made_is_refused_with_one_that_could(text):
    with pytest.raises(ValueError, match=r"expected sizes of data and network such as data=-1 or network=3,data=-1"):
        make_mesh(text, range(6))


def test_a_program_of_one_process_joins_nobody():
    assert join(None) == (0, 1)
    for text in ("", "4,0", "host:12,2,2", "host,2,0"):
        with pytest.raises(
            ValueError, match=r"expected auto, or ADDRESS:PORT,PROCESSES,NUMBER as in 10.0.0.2:1234,4,0"
        ):
            join(text)
