from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from de_ray.config import DIVERGENCES
from de_ray.problem.divergence import make_divergence
from de_ray.problem.outputs import flatten

VALUES = st.floats(-30, 30, width=32)
SHAPES = array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=5).map(  # kl wants two classes
    lambda shape: (shape[0], shape[1] + 1, *shape[2:]))
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(arrays(np.float32, shape, elements=VALUES),
                                               arrays(np.float32, shape, elements=VALUES)))


@pytest.mark.parametrize("kind", DIVERGENCES)
@settings(max_examples=60, deadline=None)
@given(pair=PAIRS)
def test_a_divergence_is_one_finite_value_a_sample_and_never_negative(kind, pair):
    teacher, student = map(torch.from_numpy, pair)
    value = make_divergence(kind)(teacher, student)
    assert value.shape == (len(teacher),)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert (value >= 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
@settings(max_examples=60, deadline=None)
@given(pair=PAIRS)
def test_equal_outputs_have_divergence_exactly_zero(kind, pair):
    output = torch.from_numpy(pair[0])
    assert make_divergence(kind)(output, output.clone()).eq(0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_outputs_that_differ_have_a_divergence_above_zero(kind):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(50, 10, generator=generator)
    for student in (torch.randn(50, 10, generator=generator), 2 * teacher, -teacher, torch.zeros_like(teacher)):
        assert (make_divergence(kind)(teacher, student) > 0).all()


def test_kl_is_what_torch_computes():
    teacher, student = torch.randn(2, 6, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    reference = torch.nn.functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True,
                                           reduction="none").sum(1).mean((1, 2))
    torch.testing.assert_close(make_divergence("kl")(teacher, student), reference)


LOGITS = st.one_of(VALUES, st.just(-np.inf))
MATRICES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 4)).flatmap(lambda shape: st.tuples(
    arrays(np.float32, shape[1:], elements=LOGITS),
    arrays(np.float32, (shape[0] * shape[1], shape[2]), elements=LOGITS)))


@settings(max_examples=100, deadline=None)
@given(pair=MATRICES)
def test_stacked_students_against_one_teacher_have_the_divergence_of_each_bit_for_bit(pair):
    teacher, students = map(torch.from_numpy, pair)
    kl = make_divergence("kl")
    found = kl.against(teacher)(students)
    expected = torch.cat([kl(teacher, student) for student in students.split(len(teacher))])
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_only_single_matrices_of_logits_have_a_part_that_is_worked_out_once():
    logits = torch.randn(4, 3)
    assert make_divergence("kl").against(logits) is not None
    for kind, output in (("kl", [logits]), ("kl", torch.randn(4, 3, 2)), ("mse", logits), ("cosine", logits)):
        assert make_divergence(kind).against(output) is None


def test_kl_stands_logits_of_minus_infinity_and_of_great_size():
    teacher = torch.tensor([[0.0, 1.0, -torch.inf], [1e4, 0.0, -1e4]])
    student = torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 1e4, -1e4]], requires_grad=True)
    value = make_divergence("kl")(teacher, student)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([(0.7310586 - 0.2689414) * 1.0, 1e4]))
    assert student.grad.isfinite().all()


def test_mse_and_cosine_have_the_values_of_their_formulas():
    teacher, student = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]])
    torch.testing.assert_close(make_divergence("mse")(teacher, student), torch.tensor([25.0]))
    torch.testing.assert_close(make_divergence("cosine")(teacher, student), torch.tensor([1.0]))
    # Same direction, three times as long: ((3 - 1) / (3 + 1))^2.
    torch.testing.assert_close(make_divergence("cosine")(teacher, 3 * teacher), torch.tensor([0.25]))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradients_are_finite_everywhere_and_lead_towards_the_teacher(kind):
    divergence = make_divergence(kind)
    teacher = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for start in (teacher.clone(), torch.zeros(8, 5), teacher + 0.5 * teacher.flip(1)):
        student = start.requires_grad_()
        divergence(teacher, student).sum().backward()
        assert student.grad.isfinite().all()
    nearer = student.detach() - 0.01 * student.grad
    assert divergence(teacher, nearer).sum() < divergence(teacher, student).sum()


def test_rounding_that_is_clamped_away_leaves_kl_its_gradient():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4000, 10, generator=generator)
    student = (teacher + 1e-4 * torch.randn(4000, 10, generator=generator)).requires_grad_()
    value = make_divergence("kl")(teacher, student)
    value.sum().backward()
    clamped = value == 0
    assert clamped.any()  # else this test shows nothing
    torch.testing.assert_close(student.grad[clamped], (student.softmax(1) - teacher.softmax(1))[clamped].detach(),
                               rtol=0, atol=1e-6)
    assert student.grad[clamped].abs().max() > 1e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_failed_student_gives_a_value_that_is_not_finite(kind):
    teacher = torch.ones(3, 4)
    student = torch.tensor([[1.0, 1, 1, 1], [torch.nan, 1, 1, 1], [torch.inf, 1, 1, 1]])
    assert make_divergence(kind)(teacher, student).isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_nested_outputs_are_summed_over_their_floating_point_tensors(kind):
    divergence = make_divergence(kind)
    a, b, c, d = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    teacher = {"x": (a, [b.double()]), "y": None, "count": 3, "index": torch.arange(3)}
    student = {"index": torch.arange(3) + 7, "x": (c, [d.double()]), "y": None, "count": 4}
    torch.testing.assert_close(divergence(teacher, student), divergence(a, c) + divergence(b, d))


@pytest.mark.parametrize(("teacher", "student"), [
    (torch.ones(2, 3), (torch.ones(2, 3),)),
    ((torch.ones(2, 3), torch.ones(2, 3)), (torch.ones(2, 3),)),
    ({"a": torch.ones(2, 3)}, {"b": torch.ones(2, 3)}),
    (torch.ones(2, 3), torch.ones(2, 4)),
    (torch.ones(2, 3), torch.ones(1, 3)),
    ((torch.ones(2, 3), torch.ones(3, 3)), (torch.ones(2, 3), torch.ones(3, 3))),
    (torch.arange(3), torch.arange(3)),
    (torch.tensor(1.0), torch.tensor(1.0)),
    (object(), object()),
], ids=["nesting", "length", "keys", "shape", "samples", "samples-within", "no-floats", "scalar", "foreign"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_outputs_that_cannot_be_compared_are_a_value_error(kind, teacher, student):
    with pytest.raises(ValueError):
        make_divergence(kind)(teacher, student)


def test_kl_of_outputs_without_classes_says_what_to_use_instead():
    with pytest.raises(ValueError, match="use mse or cosine"):
        make_divergence("kl")(torch.ones(3), torch.ones(3))


def test_an_unknown_divergence_is_a_value_error_naming_the_known_ones():
    with pytest.raises(ValueError, match="'l1'.*kl, mse, cosine"):
        make_divergence("l1")


def test_flatten_keeps_the_order_of_any_nesting():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    pair = namedtuple("Pair", "first second")
    output = OrderedDict(z=pair(a, [b]), y=None, x={"deep": (c, torch.ones(1, dtype=torch.bool))})
    assert [id(tensor) for tensor in flatten(output)] == [id(a), id(b), id(c)]
