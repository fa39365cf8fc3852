"""Where the ranks of a mesh are, as properties of any mesh. What its communicators do: the conformance suite."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab import Mesh, MplabError, World
from mplab.comm.mesh import AXES

degrees = st.integers(1, 5)
meshes = st.builds(Mesh, dp=degrees, pp=degrees, tp=degrees)
axes = st.sampled_from(AXES)


@given(meshes)
def test_ranks_and_places_are_the_same_thing(mesh: Mesh) -> None:
    places = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert [mesh.rank(**place) for place in places] == list(range(mesh.size))
    assert len({tuple(place.values()) for place in places}) == mesh.size == mesh.dp * mesh.pp * mesh.tp
    for place in places:
        for axis, degree in zip(AXES, mesh.shape, strict=True):
            assert 0 <= place[axis] < degree


@given(meshes)
def test_the_tensor_axis_is_innermost_and_the_data_axis_outermost(mesh: Mesh) -> None:
    assert [tuple(mesh.coordinates(r).values()) for r in range(mesh.size)] == [
        (d, p, t) for d in range(mesh.dp) for p in range(mesh.pp) for t in range(mesh.tp)
    ]


@given(meshes, axes)
def test_the_groups_of_an_axis_share_out_all_ranks(mesh: Mesh, axis: str) -> None:
    groups = mesh.groups(axis)
    degree = getattr(mesh, axis)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    assert len(groups) == mesh.size // degree
    for group in groups:
        assert len(group) == degree
        assert group == sorted(group)
        assert [mesh.coordinates(rank)[axis] for rank in group] == list(range(degree))
        others = [{a: c for a, c in mesh.coordinates(rank).items() if a != axis} for rank in group]
        assert all(other == others[0] for other in others)


@given(meshes, axes, axes)
def test_groups_of_two_axes_meet_in_one_rank_at_most(mesh: Mesh, a: str, b: str) -> None:
    if a != b:
        for group in mesh.groups(a):
            assert all(len(set(group) & set(other)) <= 1 for other in mesh.groups(b))


@given(meshes)
def test_draw_shows_every_rank_once(mesh: Mesh) -> None:
    lines = mesh.draw().splitlines()
    assert len(lines) == mesh.dp * mesh.pp
    assert [int(rank) for line in lines for rank in line.partition(":")[2].split()] == list(range(mesh.size))


def test_literals() -> None:
    mesh = Mesh(dp=2, pp=2, tp=2)
    assert mesh.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.groups("pp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups("dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert mesh.coordinates(5) == {"dp": 1, "pp": 0, "tp": 1}
    assert mesh.rank(dp=1, tp=1) == 5
    assert str(mesh) == "Mesh(dp=2, pp=2, tp=2)"
    assert Mesh().size == 1
    assert mesh == Mesh(2, 2, 2)
    assert mesh != Mesh(2, 4, 1)


@pytest.mark.parametrize("degree", [0, -1, 1.0, 2.5, "2", None, True])
@pytest.mark.parametrize("axis", AXES)
def test_a_degree_is_a_whole_number_of_at_least_1(axis: str, degree: object) -> None:
    with pytest.raises(MplabError, match=rf"Mesh\({axis}={degree!r}\).*whole number of at least 1"):
        Mesh(**{axis: degree})  # type: ignore[arg-type]


def test_places_and_axes_that_are_not_there() -> None:
    mesh = Mesh(dp=2, tp=3)
    for rank in (-1, 6):
        with pytest.raises(MplabError, match=rf"rank {rank} is not on Mesh\(dp=2, pp=1, tp=3\).*0 to 5"):
            mesh.coordinates(rank)
    with pytest.raises(MplabError, match=r"pp=1 is not on .*0 to 0"):
        mesh.rank(pp=1)
    with pytest.raises(MplabError, match=r"tp=-1 is not on .*0 to 2"):
        mesh.rank(tp=-1)
    with pytest.raises(MplabError, match=r"axis='ep' is no axis.*dp, pp, tp"):
        mesh.groups("ep")


@pytest.mark.parametrize("n", [1, 5, 7, 12])
def test_a_mesh_that_does_not_multiply_up_to_the_world_is_refused(n: int) -> None:
    with pytest.raises(MplabError, match=rf"3 x 1 x 2 = 6 ranks, but the world has {n}.*product is {n}"):
        World(n, device="cpu").run(lambda rank: Mesh(dp=3, tp=2).connect(rank.comm))
