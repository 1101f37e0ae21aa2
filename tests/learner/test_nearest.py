"""The nearest centroid: exactly what the plain float64 comparison says, whatever the input."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from learner.nearest import Nearest

Floats = NDArray[np.float64]


def plainly(points: Floats, table: NDArray[np.floating], penalty: Floats | None = None) -> Floats:
    """The definition: all costs, in float64."""
    with np.errstate(all="ignore"):
        cost: Floats = cdist(points, np.asarray(table, dtype=np.float64), metric="sqeuclidean")
    return cost if penalty is None else cost + penalty


def table_of(rng: np.random.Generator, codes: int, width: int) -> Floats:
    """Centroids with repeats, near repeats, and some that differ in one place only."""
    table = rng.normal(size=(codes, width)).astype(np.float32).astype(np.float64)
    for code in range(1, codes):
        other = table[rng.integers(code)]
        match rng.integers(4):
            case 0:
                table[code] = other
            case 1:
                table[code] = np.nextafter(other.astype(np.float32), np.float32(9))
            case 2:
                table[code, rng.integers(width)] = other[0]
    return table


def points_of(rng: np.random.Generator, table: Floats, points: int) -> Floats:
    """Points on centroids, halfway between two and a rounding beside that, near and far away."""
    one, other = table[rng.integers(len(table), size=(2, points))]
    halfway = (one + other) / 2
    kinds = [
        one,
        halfway,
        np.nextafter(halfway, one),
        halfway + 1e-7 * (one - other),
        one + rng.normal(size=one.shape),
        1e6 * one,
        1e17 * rng.normal(size=one.shape),
        np.zeros_like(one),
    ]
    return np.array([kinds[rng.integers(len(kinds))][row] for row in range(points)])


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    codes=st.integers(1, 40),
    width=st.integers(1, 70),
    scale=st.sampled_from([0, -18, -6, -1, 1, 6, 18]),
    offset=st.sampled_from([0.0, 1.0, 1e4, 1e9]),
    penalised=st.booleans(),
)
@example(seed=0, codes=8, width=4, scale=-44, offset=0.0, penalised=False)
@example(seed=0, codes=8, width=4, scale=37, offset=0.0, penalised=True)
def test_the_nearest_is_the_first_of_the_least_costs(
    seed: int, codes: int, width: int, scale: int, offset: float, penalised: bool
) -> None:
    rng = np.random.default_rng(seed)
    table = table_of(rng, codes, width)
    points = points_of(rng, table, 50)
    table = ((table + offset) * 10.0**scale).astype(np.float32).astype(np.float64)
    points = (points + offset) * 10.0**scale
    penalty = rng.choice([0.0, 0.5, 1.0], size=codes) * 10.0 ** (2 * scale) if penalised else None
    nearest = Nearest(table, penalty)
    wanted = plainly(points, table, penalty).argmin(axis=1)
    assert nearest.code(points).tolist() == wanted.tolist()
    assert nearest.two(points).code_N.tolist() == wanted.tolist()


def test_many_points_and_codes_agree_with_the_plain_comparison() -> None:
    """Across the pieces in which points and scores are handled."""
    rng = np.random.default_rng(1)
    table = rng.normal(size=(1500, 24)).astype(np.float32)
    points = rng.normal(size=(9000, 24))
    two = Nearest(table).two(points)
    cost = np.sort(plainly(points, table), axis=1)
    wanted = plainly(points, table).argmin(axis=1)
    assert np.array_equal(two.code_N, wanted)
    assert np.array_equal(Nearest(table).code(points), wanted)
    assert np.allclose(two.lead_N, cost[:, 1] - cost[:, 0], rtol=0, atol=1e-10)


def test_neither_an_offset_nor_repeated_centroids_put_every_point_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is in doubt is compared plainly, a hundred times slower: it must stay rare."""
    compared = 0

    def counting(points: Floats, *rest: Floats, metric: str) -> Floats:
        nonlocal compared
        compared += len(points)
        return cdist(points, *rest, metric=metric)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr("learner.nearest.cdist", counting)
    rng = np.random.default_rng(2)
    table = 100.0 + rng.normal(size=(512, 32))
    table[256:] = table[:256]
    points = 100.0 + rng.normal(size=(20_000, 32))
    points[7] = (table[1] + table[2]) / 2 + 1e3
    code = Nearest(table).code(points)
    assert 0 < compared < 100
    assert code.max() < 256


def test_the_search_without_its_bound_on_rounding_would_be_wrong() -> None:
    """The float32 product alone does not find what the tests above ask for."""
    rng = np.random.default_rng(3)
    table = table_of(rng, 40, 16)
    points = points_of(rng, table, 2000)
    near = points[np.abs(points).max(axis=1) < 10]
    product = near.astype(np.float32) @ table.T.astype(np.float32)
    by_product = (product - (table**2).sum(1).astype(np.float32) / 2).argmax(axis=1)
    assert (by_product != plainly(near, table).argmin(axis=1)).mean() > 0.01


def test_without_points_there_are_no_answers() -> None:
    nearest = Nearest(np.eye(3))
    assert nearest.code(np.zeros((0, 3))).shape == (0,)
    assert nearest.two(np.zeros((0, 3))).lead_N.shape == (0,)


def test_points_that_no_float64_can_compare_get_the_first_code() -> None:
    assert Nearest(np.eye(3)).code(np.full((1, 3), 1e200)).tolist() == [0]
