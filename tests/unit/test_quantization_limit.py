"""Files within a limit of bytes, made by a stand-in whose files are as fickle as real ones."""

from dataclasses import dataclass

import pytest

from de_ray.quantization.limit import ATTEMPTS, CLOSE, within


@dataclass(frozen=True)
class Layers:
    """A plan by its bytes."""

    bytes: int


def maker(sizes, extra=400, rise=0.0):
    """Files of layers of one of `sizes` bytes, the largest allowed, that end `rise` larger, and of `extra` beside."""
    made = []

    def plan(allowance):
        return Layers(max((size for size in sizes if size <= allowance), default=min(sizes)))

    def make(layers):
        made.append(layers.bytes)
        return round(layers.bytes * (1 + rise)) + extra, f"file {len(made)}"

    return plan, make, made


@pytest.mark.parametrize("rise", [-0.15, -0.05, 0.0, 0.05, 0.15])
def test_most_of_the_limit_is_used_whatever_refit_does_to_the_bytes(rise):
    plan, make, made = maker(range(1000, 9000, 20), rise=rise)
    size, file = within(5000, 4000, plan, make)
    assert CLOSE * 5000 <= size <= 5000
    assert file == f"file {len(made)}"


def test_what_was_too_large_is_not_made_again():
    plan, make, made = maker([3000, 3980, 4000])
    # From what was allowed, 4,180, the next allowance would be 4,060, and the same layers would be taken again.
    assert within(4300, 4180, plan, make) == (3400, "file 2")
    assert made[:2] == [4000, 3000]
    plan, make, made = maker([3000, 3800, 4000])
    assert within(4300, 4180, plan, make) == (4200, "file 2")


def test_the_largest_file_that_fits_is_kept_and_else_the_smallest():
    plan, make, made = maker([2000, 4500], extra=0)
    assert within(4000, 4600, plan, make) == (2000, "file 2")
    assert made == [4500, 2000]
    plan, make, _ = maker([4500, 4800, 5000], extra=0)
    assert within(4000, 4900, plan, make) == (4500, "file 2")


def test_no_file_is_made_twice_and_no_more_than_a_few():
    plan, make, made = maker([2000, 4500], extra=0)
    assert within(4000, 3900, plan, make) == (2000, "file 1")
    assert made == [2000]  # 3,800 would be allowed next, within which there is nothing else
    plan, make, made = maker(range(1000, 9000, 100), rise=-0.5)
    within(5000, 4000, plan, make)
    assert len(made) == ATTEMPTS


def test_where_nothing_can_fit_the_smallest_file_is_made():
    plan, make, made = maker([2000, 3000], extra=20_000)

    def checked(allowance):
        assert allowance >= 1, "of which a logarithm is taken"
        return plan(allowance)

    assert within(5000, 4000, checked, make) == (22_000, "file 2")
    assert made == [3000, 2000]


def test_a_file_that_is_close_to_the_limit_ends_the_search():
    plan, make, made = maker([3600])
    assert within(4100, 3700, plan, make) == (4000, "file 1")
    assert made == [3600]
