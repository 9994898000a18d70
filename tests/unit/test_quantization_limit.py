"""Files within a limit of bytes, made by a stand-in whose files are as fickle as real ones."""

import pytest

from de_ray.quantization.limit import ATTEMPTS, CLOSE, within


def maker(sizes, extra=400, rise=0.0):
    """Files of layers that take one of `sizes` bytes, the largest allowed, and end `rise` larger, and `extra` beside."""
    made = []

    def make(allowance):
        taken = max((size for size in sizes if size <= allowance), default=min(sizes))
        made.append(taken)
        return round(taken * (1 + rise)) + extra, taken, f"file {len(made)}"

    return make, made


@pytest.mark.parametrize("rise", [-0.15, -0.05, 0.0, 0.05, 0.15])
def test_most_of_the_limit_is_used_whatever_refit_does_to_the_bytes(rise):
    make, made = maker(range(1000, 9000, 20), rise=rise)
    size, file = within(5000, 4000, make)
    assert CLOSE * 5000 <= size <= 5000
    assert file == f"file {len(made)}"


def test_what_was_too_large_is_not_made_again():
    make, made = maker([3000, 3980, 4000])
    # From what was allowed, 4,180, the next allowance would be 4,060, and the same layers would be taken again.
    assert within(4300, 4180, make) == (3400, "file 2")
    assert made[:2] == [4000, 3000]
    make, made = maker([3000, 3800, 4000])
    assert within(4300, 4180, make) == (4200, "file 2")


def test_the_largest_file_that_fits_is_kept_and_else_the_smallest():
    make, made = maker([2000, 4500], extra=0)
    assert within(4000, 4600, make) == (2000, "file 2")
    assert len(made) == ATTEMPTS
    make, _ = maker([4500, 4800, 5000], extra=0)
    assert within(4000, 4900, make) == (4500, "file 2")


def test_a_file_that_is_close_to_the_limit_ends_the_search():
    make, made = maker([3600])
    assert within(4100, 3700, make) == (4000, "file 1")
    assert made == [3600]
