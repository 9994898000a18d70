import itertools
import json
import math
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from de_ray.config import Config, DataConfig, ProblemConfig, RefitConfig
from de_ray.fingerprint import fingerprint
from de_ray.problem import detection_augment
from de_ray.problem.annotations import Annotations, read_annotations
from de_ray.problem.bernoulli import bernoulli_kl
from de_ray.problem.build import build_problem
from de_ray.problem.coco import GREY, load_images
from de_ray.problem.coco_problem import LEAST_CHANCE
from de_ray.problem.darknet import Head
from de_ray.problem.detection import MOST, Detections, Letterbox, decode, detect, suppress
from de_ray.problem.detection_augment import Mosaics, augment_detection
from de_ray.problem.detection_divergence import SIGMA, detection_divergence
from de_ray.problem.detection_metrics import agreement, average_precision
from de_ray.refit.objective import Objective
from tests.networks import small_cfg

HEAD = Head(((10.0, 20.0), (40.0, 30.0)), 2, 16)
KL = detection_divergence(2)
LOGITS = arrays(np.float32, (2, 14, 2, 3), elements=st.floats(-12, 12, width=32))


def heads_output(objectness=-20.0):
    """One head [1, 14, 2, 3] without objects."""
    return torch.full((1, 2, 7, 2, 3), objectness)


def found(*rows):
    """Detections of rows (left, top, right, bottom, score, class), best first."""
    table = torch.tensor(rows).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def test_a_logit_of_each_kind_is_decoded_to_its_box_and_score():
    output = heads_output()
    output[0, 1, :, 1, 2] = torch.tensor([0.0, math.log(3), math.log(2), 0, 4, 3, -20])
    (detection,) = detect([output.flatten(1, 2)], [HEAD])
    # Centre (2.5, 1.75) cells of 16 pixels; 80 x 30 pixels.
    torch.testing.assert_close(detection.boxes, torch.tensor([[0.0, 13, 80, 43]]))
    expected = torch.tensor([4.0]).sigmoid() * torch.tensor([3.0]).sigmoid()
    torch.testing.assert_close(detection.scores, expected)
    assert detection.classes.tolist() == [0]
    boxes, scores = decode([output.flatten(1, 2)] * 2, [HEAD, HEAD])
    assert boxes.shape == (1, 24, 4) and scores.shape == (1, 24, 2)


def test_a_worse_box_of_the_same_class_is_suppressed_and_of_another_class_is_not():
    output = heads_output()
    output[0, 1, :, 1, 2] = torch.tensor([0.0, 0, 0, 0, 4, 3, 2])  # both classes, one box
    output[0, 1, :, 1, 1] = torch.tensor([4.0, 0, 0, 0, 3, 3, -20])  # nearly the same place
    (detection,) = detect([output.flatten(1, 2)], [HEAD])
    assert detection.classes.tolist() == [0, 1]
    assert detection.scores[0] > detection.scores[1]


def test_a_box_beyond_all_bounds_suppresses_none_of_another_class():
    boxes = torch.tensor([[100.0, 100, 110, 110], [106, 100, 116, 110], [0, 0, 1.1e6, 1.1e6]])
    scores = torch.zeros(3, 80)
    scores[0, 79], scores[1, 79], scores[2, 0] = 0.9, 0.8, 0.002
    assert suppress(boxes, scores, 0.001)[1].tolist() == [0, 1, 2]


def test_a_broken_student_gives_few_detections_in_little_time_and_no_error():
    noise = torch.randn(1, 14, 40, 40, generator=torch.Generator().manual_seed(0)) * 100
    (many,) = detect([noise], [HEAD])
    assert 0 < len(many) <= MOST and many.boxes.isfinite().all()
    assert len(detect([torch.full((1, 14, 2, 2), math.nan)], [HEAD])[0]) == 0


def test_outputs_of_another_shape_are_a_value_error():
    with pytest.raises(ValueError, match=r"\[1, 15, 2, 2\]: expected \[N, A x 7, H, W\]"):
        detect([torch.zeros(1, 15, 2, 2)], [HEAD])
    with pytest.raises(ValueError, match="expected .N, A x 7"):
        KL([torch.zeros(1, 15, 2, 2)], [torch.zeros(1, 15, 2, 2)])


@pytest.mark.parametrize(("width", "height"), [(640, 426), (333, 500), (416, 416), (1000, 3), (7, 5)])
def test_letterboxing_is_undone_to_within_half_a_pixel_and_boxes_are_clipped(width, height):
    letterbox = Letterbox(width, height, 416)
    (left, top), (inner_width, inner_height) = letterbox.corner, letterbox.inner
    assert max(inner_width, inner_height) == 416 and min(inner_width, inner_height) >= 1
    whole = torch.tensor([[left, top, left + inner_width, top + inner_height], [-50, -50, 900, 900]]).float()
    undone = letterbox.undo(Detections(whole, torch.ones(2), torch.zeros(2, dtype=torch.long))).boxes
    torch.testing.assert_close(undone, torch.tensor([[0.0, 0, width, height]] * 2))


@settings(max_examples=80, deadline=None)
@given(teacher=LOGITS, student=LOGITS)
def test_the_divergence_is_never_negative_and_zero_for_equal_heads(teacher, student):
    t, s = torch.from_numpy(teacher), torch.from_numpy(student)
    value = KL([t, t], [s, s])
    assert value.shape == (2,) and (value >= 0).all() and value.isfinite().all()
    assert KL([t, t], [t.clone(), t.clone()]).eq(0).all()


@pytest.mark.parametrize("channel", range(7))
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.3, 5.0])
def test_any_logit_that_differs_makes_the_divergence_positive(channel, size):
    teacher = torch.randn(1, 14, 2, 3, generator=torch.Generator().manual_seed(0))
    student = teacher.clone()
    student.view(2, 7, 2, 3)[1, channel, 1, 2] += size
    assert KL([teacher], [student]) > 0


@pytest.mark.parametrize("spread", [1e-3, 0.1, 0.25, 1, 10])
def test_bernoulli_kl_is_the_float64_reference_near_and_far(spread):
    generator = torch.Generator().manual_seed(0)
    t = 5 * torch.randn(20_000, generator=generator)
    s = (t + spread * torch.randn(20_000, generator=generator)).requires_grad_()
    value = bernoulli_kl(t, s)
    value.sum().backward()
    t64, s64 = t.double(), s.detach().double()
    log = torch.nn.functional.logsigmoid
    expected = t64.sigmoid() * (log(t64) - log(s64)) + (-t64).sigmoid() * (log(-t64) - log(-s64))
    torch.testing.assert_close(value.detach().double(), expected, rtol=2e-5, atol=1e-15)
    torch.testing.assert_close(s.grad.double(), s64.sigmoid() - t64.sigmoid(), rtol=0, atol=1e-6)


def test_the_terms_have_the_weights_of_the_chain_rule():
    teacher = heads_output(0.0)
    teacher[:, :, :4] = 0
    teacher[0, 0, 4, 0, 0] = 1.0  # objectness of one anchor
    p = torch.tensor(1.0).sigmoid()

    def after(channel, change):
        student = teacher.clone()
        student[0, 0, channel, 0, 0] += change
        return KL([teacher.flatten(1, 2)], [student.flatten(1, 2)])[0]

    half = torch.tensor(0.0)
    torch.testing.assert_close(after(2, 0.5), p * 0.5**2 / (2 * SIGMA**2))
    torch.testing.assert_close(after(1, math.log(3)), p * 0.25**2 / (2 * SIGMA**2))  # sigmoid from 0.5 to 0.75
    torch.testing.assert_close(after(6, 2.0), p * bernoulli_kl(half, half + 2))
    torch.testing.assert_close(after(4, 2.0), bernoulli_kl(torch.tensor(1.0), torch.tensor(3.0)))


def test_emphasis_weighs_anchors_by_the_teachers_objectness():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (4 * torch.randn(2, 14, 2, 3, generator=generator) for _ in range(2))
    expected = torch.zeros(2)
    anchors = teacher.view(2, 2, 7, 2, 3)
    for anchor, row, column in itertools.product(range(2), range(2), range(3)):
        # All others equal: what is left is that anchor's share.
        alone = teacher.clone().view_as(anchors)
        alone[:, anchor, :, row, column] = student.view_as(anchors)[:, anchor, :, row, column]
        share = KL([teacher], [alone.flatten(1, 2)])
        expected += share * (1 + 3 * anchors[:, anchor, 4, row, column].sigmoid())
    torch.testing.assert_close(detection_divergence(2, emphasis=3.0)([teacher], [student]), expected)


def test_a_failed_student_has_a_divergence_that_is_not_finite():
    teacher = torch.zeros(3, 14, 1, 1)
    student = teacher.clone()
    student[1, 4], student[2, 9] = math.nan, math.inf
    assert KL([teacher], [student]).isfinite().tolist() == [True, False, False]


def test_gradients_lead_to_the_teacher():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 14, 2, 3, generator=generator)
    student = torch.randn(2, 14, 2, 3, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([student], 0.05)
    start = KL([teacher], [student]).sum().item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = KL([teacher], [student]).sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3 * start


def test_the_scores_gradient_has_the_curvature_as_its_covariance():
    output = torch.randn(1, 7, 1, 1, generator=torch.Generator().manual_seed(3))
    curvature = torch.autograd.functional.hessian(lambda s: KL([output], [s]).sum(), output).reshape(7, 7)
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for _ in range(3000):
        leaf = output.clone().requires_grad_()
        gradients.append(torch.autograd.grad(KL.score([leaf], generator), leaf)[0].flatten())
    g = torch.stack(gradients)
    unit = curvature.diagonal().sqrt()
    torch.testing.assert_close(g.T @ g / len(g) / unit[:, None] / unit, torch.eye(7), rtol=0, atol=0.08)
    assert (g.mean(0) / unit).abs().max() < 0.08


def test_the_divergence_can_be_pickled():
    output = torch.randn(1, 14, 2, 3, generator=torch.Generator().manual_seed(0))
    twin = pickle.loads(pickle.dumps(KL))
    assert twin([output], [2 * output]).equal(KL([output], [2 * output]))


BOX = (0.0, 0, 10, 10)
NEAR = (1.0, 0, 11, 10)
FAR = (30.0, 0, 40, 10)


@pytest.mark.parametrize(("teacher", "student", "expected"), [
    ([(*BOX, 0.9, 1)], [(*BOX, 0.9, 1)], (1, 1, 1, 1, 0)),
    ([(*BOX, 0.9, 1)], [(*NEAR, 0.25, 1)], (1, 1, 1, 1, 0)),
    ([(*BOX, 0.9, 1)], [(*BOX, 0.24, 1)], (0, 0, 1, 1, 0)),
    ([(*BOX, 0.9, 1)], [(*BOX, 0.9, 2)], (0, 0, 1, 1, 1)),
    ([(*BOX, 0.9, 1)], [(*FAR, 0.9, 1)], (0, 0, 1, 1, 1)),
    ([(*BOX, 0.9, 1), (*FAR, 0.6, 1)], [(*BOX, 0.9, 1)], (1, 0.5, 1, 2, 0)),
    ([(*BOX, 0.9, 1), (*NEAR, 0.85, 1)], [(*BOX, 0.9, 1)], (0.5, 0.5, 2, 2, 0)),  # one box is one object
    ([(*BOX, 0.95, 1), (0.0, 0, 10, 16.5, 0.9, 1)], [(0.0, 0, 10, 12, 0.9, 1), (0.0, 0, 10, 7, 0.9, 1)],
     (1, 1, 2, 2, 0)),  # each has one of its own, though the first overlaps the other's most
    ([(*BOX, 0.3, 1)], [(*BOX, 0.81, 1)], (1, 1, 0, 0, 0)),  # unsure is not absent
    ([(*BOX, 0.2, 1)], [(*BOX, 0.81, 1)], (1, 1, 0, 0, 1)),
    ([(*BOX, 0.9, 1)], [], (0, 0, 1, 1, 0)),
    ([(0.0, 5, 0, 9, 0.9, 1)], [(0.0, 5, 0, 9, 0.9, 1)], (1, 1, 0, 0, 0)),  # in the grey bar, nothing in the image
    ([], [], (1, 1, 0, 0, 0)),
])
def test_agreement_counts_objects_that_are_kept_and_invented(teacher, student, expected):
    result = agreement([found(*teacher)], [found(*student)])
    keys = ("agreement_80", "agreement_50", "objects_80", "objects_50", "false_80")
    assert tuple(result[key] for key in keys) == expected
    assert all(isinstance(value, float) for value in result.values())


def coco_content(count=3, categories=(3, 90)):
    images = [{"id": 10 + i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(count)]
    notes = [{"id": i + 1, "image_id": 10 + i, "category_id": categories[i % 2], "bbox": [5, 6, 30, 40], "area": 1200,
              "iscrowd": 0} for i in range(count)]
    return {"images": images, "annotations": notes, "categories": [{"id": c, "name": str(c)} for c in categories]}


def test_average_precision_counts_classes_as_cocos_category_ids():
    annotations = Annotations(coco_content(), tuple(map(Path, "abc")))
    box = (5.0, 6, 35, 46)
    right = [found((*box, 0.9, 0)), found((*box, 0.9, 1)), found((*box, 0.9, 0))]
    assert average_precision(right, annotations) == pytest.approx({"AP": 1, "AP50": 1})
    swapped = [found((*box, 0.9, 1)), found((*box, 0.9, 0)), found((*box, 0.9, 1))]
    assert average_precision(swapped, annotations) == {"AP": 0, "AP50": 0}
    assert average_precision([found()] * 3, annotations) == {"AP": 0, "AP50": 0}


@pytest.mark.parametrize("numbers", [(0, 1, 2), (1, 1, 1), (None, "a", 7)])
def test_whatever_annotations_are_numbered_and_what_they_leave_out_a_perfect_detector_is_perfect(coco, numbers):
    content = coco_content()
    for annotation, number in zip(content["annotations"], numbers, strict=True):
        del annotation["area"], annotation["iscrowd"]
        annotation["id"] = number
    del content["images"][0]["width"]
    content["images"][1]["height"] = None
    path = coco / "annotations" / "instances_val2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())  # a mark that editors leave
    annotations = read_annotations(path, coco / "val2017", 2)
    assert annotations.sizes == [None, None, (80, 60)]
    box = (5.0, 6, 35, 46)
    right = [found((*box, 0.9, 0)), found((*box, 0.9, 1)), found((*box, 0.9, 0))]
    assert average_precision(right, annotations) == pytest.approx({"AP": 1, "AP50": 1})
    assert average_precision(right, annotations, "segm") == {"AP": -1, "AP50": -1}  # boxes alone


@pytest.mark.parametrize("outline", [
    [[]], [[5, 5]], [[5, 5, 20, 20]], [[5, 5, 20, 20, 3]], "foo", 5.0, {"x": 1}, [[5, 5, 9, 9, "a", 3]],
    {"counts": [185, 100], "size": [60, 80]}, {"counts": [4700, 100], "size": [80, 60]},
    {"counts": "a", "size": [1, 2]},
])
def test_outlines_that_enclose_nothing_leave_boxes_to_be_measured(coco, outline, caplog):
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[5, 6, 35, 6, 35, 46, 5, 46]]
    path = coco / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content))
    assert read_annotations(path, coco / "val2017", 2).masked and not caplog.text
    content["annotations"][1]["segmentation"] = outline
    path.write_text(json.dumps(content))
    annotations = read_annotations(path, coco / "val2017", 2)
    assert not annotations.masked and "1 of 3 annotations have no outline that encloses anything" in caplog.text
    box = (5.0, 6, 35, 46)
    right = [found((*box, 0.9, 0)), found((*box, 0.9, 1)), found((*box, 0.9, 0))]
    assert average_precision(right, annotations) == pytest.approx({"AP": 1, "AP50": 1})
    assert average_precision(right, annotations, "segm") == {"AP": -1, "AP50": -1}


def test_an_outline_keeps_the_polygons_that_enclose_something(coco):
    content, triangle, runs = coco_content(), [5, 6, 35, 6, 35, 46], {"counts": [4700, 100], "size": [60, 80]}
    for annotation, outline in zip(content["annotations"], ([[5, 5], triangle], runs, [triangle]), strict=True):
        annotation["segmentation"] = outline
    path = coco / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content))
    annotations = read_annotations(path, coco / "val2017", 2)
    assert [a["segmentation"] for a in annotations.content["annotations"]] == [[triangle], runs, [triangle]]


MOSAICS = Mosaics(0.25)


@pytest.fixture
def coco(tmp_path):
    """A small COCO: 6 training images, 3 held-out ones, two classes."""
    generator = np.random.default_rng(0)
    for folder, count in (("train2017", 6), ("val2017", 3), ("more", 2)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            pixels = generator.integers(0, 256, (60, 80, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{index}.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(coco_content()))
    (tmp_path / "small.cfg").write_text(small_cfg(2))
    return tmp_path


def small(coco, **fields):
    data = DataConfig(str(coco), fields.pop("unlabelled", []), 64, fields.pop("workers", 0),
                      draw=fields.pop("draw", "uniform"), emphasis=fields.pop("emphasis", 0.0))
    values = {"name": "yolov3_tiny", "divergence": "detection", "cfg": str(coco / "small.cfg"), "weights": "random",
              "data": data, "calibration_size": 4}
    return ProblemConfig(**values | fields)


def test_refit_minimises_the_emphasised_divergence_and_the_plain_one_is_measured(coco):
    plain, problem = build_problem(small(coco), seed=0), build_problem(small(coco, emphasis=5.0), seed=0)
    expected = problem.teacher(problem.inputs[:2])
    found = [head + 1 for head in expected]
    measured = problem.divergence(expected, found)
    assert measured.equal(plain.divergence(expected, found))
    assert (problem.objective(expected, found) > 1.5 * measured).all()
    losses = [sum(Objective(one, RefitConfig(batch=2), torch.device("cpu")).parts(
        lambda inputs: [head + 1 for head in problem.teacher(inputs)], torch.Generator().manual_seed(0)))
        for one in (plain, problem)]
    assert losses[1] > 1.5 * losses[0] > 0


def test_images_that_were_added_or_replaced_are_another_runs(coco):
    config = Config(problem=small(coco))
    before = fingerprint(build_problem(config.problem, 0), config)
    assert before == fingerprint(build_problem(config.problem, 0), config)
    Image.new("RGB", (80, 60)).save(coco / "train2017" / "3.png")
    assert before != fingerprint(build_problem(config.problem, 0), config)


def test_worker_processes_read_the_same_images_in_order(coco):
    files = sorted((coco / "train2017").iterdir())
    images, letterboxes = load_images(files, 64, 0)
    assert images.shape == (6, 3, 64, 64) and images.dtype == torch.uint8
    assert letterboxes == [Letterbox(80, 60, 64)] * 6
    assert images[:, :, :8].eq(GREY).all() and images[:, :, -8:].eq(GREY).all() and not images[:, :, 8].eq(GREY).all()
    assert load_images(files, 64, 2)[0].equal(images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_a_value_error_that_names_it(coco, workers):
    path = coco / "train2017" / "3.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"3\.png: not an image"):
        load_images(sorted((coco / "train2017").iterdir()), 64, workers)


def test_images_are_upright_unless_their_annotations_say_otherwise(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.new("RGB", (80, 60)).save(path, exif=exif)
    for known, size in ((None, (60, 80)), ((60, 80), (60, 80)), ((80, 60), (80, 60))):
        assert load_images([path], 64, 0, [known])[1] == [Letterbox(*size, 64)]
    with pytest.raises(ValueError, match=r"turned\.jpg: .*80 x 60 pixels, its annotations are of 40 x 30"):
        load_images([path], 64, 0, [(40, 30)])


def test_sixteen_bits_of_grey_are_as_eight(tmp_path):
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "b.png")
    (a, b), _ = load_images([tmp_path / "a.png", tmp_path / "b.png"], 64, 0)
    assert a.equal(b) and a.float().std() > 50


def test_images_are_counted_once_and_held_out_ones_among_them_told(coco, caplog):
    problem = build_problem(small(coco, unlabelled=[str(coco / "val2017"), str(coco / "train2017")]), seed=0)
    assert len(problem.inputs) == 9
    assert "3 of the 3 held-out images are calibration images too" in caplog.text


def test_a_size_that_the_configuration_does_not_name_is_told(coco, caplog):
    build_problem(small(coco), seed=0)
    assert "small.cfg is of images of" not in caplog.text
    path = coco / "small.cfg"
    path.write_text(path.read_text().replace("[net]", "[net]\nwidth=96\nheight=64"))
    build_problem(small(coco), seed=0)
    assert "small.cfg is of images of 96 x 64; they are 64 x 64 here" in caplog.text


@pytest.mark.parametrize(("content", "message"), [
    ("{", "not COCO instances"), ("[]", "not COCO instances"), ('{"images": []}', "not COCO instances"),
    (json.dumps(coco_content(categories=(1, 1))), "categories=2: expected distinct ids, found 1"),
    (json.dumps(coco_content(1, (3,)) | {"annotations": []}), "has 1 categories: expected 2"),
    (json.dumps(coco_content(5)), r"lists 5 images, of which 2 are not in .*val2017, 3\.png for one"),
    (json.dumps(coco_content() | {"images": coco_content(2)["images"]}), "1 annotations of images"),
    (json.dumps(coco_content(0)), "0 images"),
    (json.dumps(coco_content(categories=("1", "2"))), "id='1', expected a whole number"),
    (json.dumps(coco_content() | {"images": coco_content()["images"][:1] * 3}), "images=3: expected distinct ids"),
    (json.dumps(coco_content() | {"categories": [{"id": 3}, {"id": 4}]}), "1 annotations of categories"),
    (json.dumps(coco_content()).replace("[5, 6, 30, 40]", "[5, 6, 30]"), "bbox"),
    (json.dumps(coco_content()).replace('"0.png"', "null"), "file_name=None, expected text"),
])
def test_annotations_that_do_not_fit_say_why(coco, content, message):
    path = coco / "annotations" / "instances_val2017.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_annotations(path, coco / "val2017", 2)


def test_a_detector_is_a_problem_with_unlabelled_inputs_and_metrics(coco):
    problem = build_problem(small(coco, unlabelled=[str(coco / "more")]), seed=0)
    assert problem.inputs.shape == (8, 3, 64, 64) and problem.held_out.shape == (3, 3, 64, 64)
    assert all(any(image.equal(one) for one in problem.inputs) for image in problem.calibration)
    assert problem.architecture == "darknet:small.cfg"
    assert [layer.name for layer in problem.layers] == ["conv0", "conv1"]
    metrics = problem.metrics(problem.teacher)
    assert {"AP", "AP50", "agreement_80", "agreement_50", "objects_80", "objects_50", "false_80"} == metrics.keys()
    assert metrics["agreement_50"] == 1 and all(isinstance(value, float) for value in metrics.values())
    output = problem.teacher(problem.inputs[:2])
    assert problem.divergence(output, output).eq(0).all()


def test_the_seed_draws_inputs_before_they_are_read_and_augments_calibration(coco):
    first, again, other = (build_problem(small(coco, inputs_size=5, augment="detection", augment_share=1.0), seed)
                           for seed in (0, 0, 1))
    assert first.inputs.shape[0] == 5 and first.calibration.shape[0] == 4
    assert first.calibration.equal(again.calibration) and first.inputs.equal(again.inputs)
    assert not first.calibration.equal(other.calibration)
    # More than there are: all of them.
    assert len(build_problem(small(coco, inputs_size=4096, calibration_size=100), 0).calibration) == 6


def test_everything_that_is_missing_is_named_at_once_with_the_way_to_get_it(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("DE_RAY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        build_problem(ProblemConfig(name="yolov3_tiny", divergence="detection"), seed=0)
    places = [tmp_path / "darknet" / "yolov3-tiny.weights", tmp_path / "coco" / "val2017", cache / "datasets"]
    for said in (*map(str, places), "pjreddie.com", "images.cocodataset.org", "problem.weights=", "problem.data.root="):
        assert said in str(error.value)


@pytest.mark.parametrize(("fields", "message"), [
    ({"data": DataConfig(size=100)}, r"problem\.data\.size=100: expected a multiple of the largest stride, 32"),
    ({"cfg": "absent.cfg"}, r"problem\.cfg='absent\.cfg': no such file"),
    ({"include": ["conv7"]}, "conv7"),
    ({"unlabelled": ["absent"]}, r"problem\.data\.unlabelled='absent': no such folder"),
    ({"weights": "absent.weights"}, "no absent.weights"),
])
def test_mistakes_of_a_detectors_configuration_name_the_key(coco, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_problem(small(coco, **fields), seed=0)


@pytest.mark.parametrize(("fields", "key"), [
    ({"name": "yolov3"}, "divergence"), ({"name": "yolov3", "divergence": "mse", "augment": "shift"}, "augment"),
    ({"augment": "detection"}, "augment"), ({"divergence": "detection"}, "divergence"),
    ({"weights": "random"}, "weights"), ({"cfg": "a.cfg"}, "cfg"), ({"data": DataConfig(root="x")}, "data"),
])
def test_fields_of_detectors_and_classifiers_do_not_mix(fields, key):
    with pytest.raises(ValueError, match=rf"problem\.{key}=.*: expected"):
        ProblemConfig(**fields)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_is_the_generators_keeps_the_type_and_changes_a_share(dtype):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (200, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images / 255
    kept = images.clone()
    results = [augment_detection(images, torch.Generator().manual_seed(seed), 0.5, MOSAICS) for seed in (0, 0, 1)]
    assert results[0].equal(results[1]) and not results[0].equal(results[2]) and images.equal(kept)
    assert results[0].dtype == dtype and results[0].shape == images.shape
    assert 70 < int((results[0] != images).flatten(1).any(1).sum()) < 130
    if dtype == torch.float32:
        assert 0 <= results[0].min() and results[0].max() <= 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_of_detectors_runs_where_images_are(dtype):
    images = torch.empty(4, 3, 8, 8, dtype=dtype, device="meta")  # stands for a GPU, and holds no values
    others = torch.zeros(6, 3, 8, 8, dtype=dtype)
    made = augment_detection(images, torch.Generator().manual_seed(0), 0.5, Mosaics(0.5, others))
    assert made.device.type == "meta" and made.dtype == dtype and made.shape == images.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mosaics_are_of_four_images_by_their_chances(monkeypatch, dtype):
    for name, neutral in (("PASTED", 0), ("ZOOM", (1, 1)), ("CONTRAST", (1, 1)), ("BRIGHTNESS", 0), ("TINT", 0)):
        monkeypatch.setattr(detection_augment, name, neutral)
    others = torch.arange(0, 250, 10, dtype=torch.uint8)[:, None, None, None].expand(25, 3, 8, 8)
    others = others if dtype == torch.uint8 else others / 255
    chances = (torch.arange(25) % 5 == 0).float()
    batch = torch.full((50, 3, 8, 8), 255, dtype=torch.uint8)
    made = augment_detection(batch, torch.Generator().manual_seed(0), 1.0, Mosaics(1.0, others, chances))
    quarters = made.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)  # [50, 2, 2, 48]
    assert quarters.amin(3).equal(quarters.amax(3)), "an image is of one grey, and so is a quarter"
    assert sorted(quarters.unique().tolist()) == [0, 50, 100, 150, 200]
    assert (quarters[:, :, :, 0].flatten(1).sort(1).values.diff() > 0).any(1).float().mean() > 0.9


def test_images_are_drawn_by_the_objects_that_the_teacher_expects(coco, cache):
    problem = build_problem(small(coco, unlabelled=[str(coco / "more")], draw="objects"), seed=0)
    find = partial(detect, heads=problem.teacher.heads)
    expected = [float(find(problem.teacher(image[None]))[0].scores.sum()) for image in problem.inputs]
    assert len(set(expected)) > 1
    assert problem.chances.tolist() == pytest.approx([LEAST_CHANCE + one for one in expected], rel=1e-4)
    assert all(any(image.equal(one) for one in problem.inputs) for image in problem.calibration)
    assert problem.calibration.flatten(1).unique(dim=0).shape[0] == 4, "none twice"


def test_the_pass_over_all_images_is_made_once(coco, cache, caplog):
    caplog.set_level("INFO")

    def chances(seed=0):
        """Of a build, and whether the teacher had to look at the images."""
        caplog.clear()
        found = build_problem(small(coco, draw="objects"), seed=seed).chances
        return found, "how many objects" in caplog.text

    first, made = chances()
    again, anew = chances()
    assert made and not anew and again.equal(first)
    assert chances(seed=1)[1], "other weights"
    Image.new("RGB", (80, 60)).save(coco / "train2017" / "0.png")
    changed, made = chances()
    assert made and not changed.equal(first)
    for file in (cache / "objects").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    mended, made = chances()
    assert made and mended.equal(changed) and "damaged and made anew" in caplog.text
    assert not chances()[1]
    shutil.rmtree(cache / "objects")
    (cache / "objects").write_text("not a folder")
    unkept, made = chances()
    assert made and unkept.equal(changed) and "objects is not kept" in caplog.text


def test_what_augmentation_brings_in_is_the_letterboxes_grey():
    images = torch.full((100, 3, 16, 16), 255, dtype=torch.uint8)
    made = augment_detection(images, torch.Generator().manual_seed(0), 1.0, MOSAICS)
    corners = made[:, :, ::15, ::15].permute(0, 2, 3, 1)
    grey = corners.flatten(0, 2).float().sub(GREY).abs().amax(1) <= 1
    assert 0.1 < grey.float().mean() < 0.7  # of smaller images; larger ones cover the square


def test_augmentation_flips_and_scales_alike_in_both_directions(monkeypatch):
    for name, neutral in (("PASTED", 0), ("CONTRAST", (1, 1)), ("BRIGHTNESS", 0), ("TINT", 0)):
        monkeypatch.setattr(detection_augment, name, neutral)
    images = torch.full((200, 3, 64, 64), GREY / 255)
    images[:, :, 24:40, 24:40] = 0  # a square of 16 pixels, red on its left and blue on its right
    images[:, 0, 24:40, 24:32] = images[:, 2, 24:40, 32:40] = 1
    sizes, flips = [], 0
    for image in augment_detection(images, torch.Generator().manual_seed(0), 1.0, Mosaics(0)):
        rows, columns = (image[1] < GREY / 255 / 2).nonzero(as_tuple=True)  # where there is no green
        if rows.min() == 0 or columns.min() == 0 or rows.max() == 63 or columns.max() == 63:
            continue  # cropped
        height, width = (int(at.max() - at.min()) + 1 for at in (rows, columns))
        assert abs(height - width) <= 1
        sizes.append(width)
        red, blue = ((image[channel] > 0.9).nonzero()[:, 1].float().mean() for channel in (0, 2))
        flips += int(red > blue)
    assert len(sizes) > 150 and 9 <= min(sizes) <= 11 and 22 <= max(sizes) <= 27  # 16 x 0.6 to 16 x 1.6
    assert 0.35 < flips / len(sizes) < 0.65


def test_augmentation_pastes_rectangles_of_other_images(monkeypatch):
    for name, neutral in (("ZOOM", (1, 1)), ("CONTRAST", (1, 1)), ("BRIGHTNESS", 0), ("TINT", 0)):
        monkeypatch.setattr(detection_augment, name, neutral)
    images = torch.linspace(0, 1, 200)[:, None, None, None].expand(200, 3, 32, 32).contiguous()
    other = (augment_detection(images, torch.Generator().manual_seed(0), 1.0, Mosaics(0)) - images).abs() > 1e-3
    assert 60 < int(other.flatten(1).any(1).sum()) < 130  # half of them, but for rectangles of no area
    for pasted in other[other.flatten(1).any(1)]:
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert pasted.equal((rows[:, None] & columns[None, :]).expand(3, 32, 32)), "a rectangle, of all colours"


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 6), (2, 3, 7, 7), (3, 8, 8)])
def test_augmentation_of_what_is_no_letterboxed_image_is_a_value_error(shape):
    with pytest.raises(ValueError, match=r"problem\.augment='detection'"):
        augment_detection(torch.zeros(shape), torch.Generator(), 1.0, MOSAICS)
