"""The published YOLOv3-tiny on real images: what the paper's claim is measured with."""

import copy

import pytest
import torch

from de_ray.device import threads
from de_ray.evaluation.capture import capture
from de_ray.problem.build import build_problem
from de_ray.schema import compose


@pytest.fixture(scope="module")
def problem(data_root):
    return build_problem(compose(["problem=yolov3_tiny", f"problem.data.root={data_root / 'coco'}",
                                  f"problem.weights={data_root / 'darknet' / 'yolov3-tiny.weights'}"]).problem, seed=0)


@pytest.fixture(scope="module")
def teacher_metrics(problem):
    with threads(1):
        return problem.metrics(problem.teacher)


def test_the_published_weights_reach_their_average_precision(teacher_metrics):
    # An implementation without clipping and without antialiasing had 0.334 and 0.192; both add some.
    assert 0.334 <= teacher_metrics["AP50"] <= 0.38
    assert 0.192 <= teacher_metrics["AP"] <= 0.23


def test_the_teacher_agrees_with_itself(teacher_metrics):
    assert teacher_metrics["agreement_80"] == teacher_metrics["agreement_50"] == 1
    assert teacher_metrics["false_80"] == 0
    assert teacher_metrics["objects_50"] > teacher_metrics["objects_80"] > 20


def test_a_student_that_lost_weights_loses_objects_and_moves_away(problem, teacher_metrics):
    student = copy.deepcopy(problem.teacher)
    for layer in problem.layers:
        weight = student.get_submodule(layer.name).weight
        cut = weight.abs().flatten().kthvalue(weight.numel() // 2).values
        weight.data[weight.abs() <= cut] = 0
    with threads(1), torch.no_grad():
        metrics = problem.metrics(student)
        images = problem.held_out[:4]
        assert (problem.divergence(problem.teacher(images), student(images)) > 1).all()
    assert metrics["agreement_80"] < 0.7
    assert metrics["AP50"] < teacher_metrics["AP50"] - 0.05


def test_the_network_is_captured_for_any_number_of_real_images(problem):
    with threads(1), torch.no_grad():
        program = capture(problem.teacher, problem.calibration)
        outputs, expected = program.outputs(problem.calibration[:3]), problem.teacher(problem.calibration[:3])
    assert [tuple(output.shape) for output in outputs] == [(3, 255, 13, 13), (3, 255, 26, 26)]
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
