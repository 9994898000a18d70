import logging
import pickle

import pytest
import torch

from de_ray.config import DataConfig, ProblemConfig, TeacherConfig
from de_ray.device import threads
from de_ray.problem import scenes_teacher
from de_ray.problem.annotations import Annotations
from de_ray.problem.build import build_architecture, build_problem
from de_ray.problem.datasets import LabelledImages
from de_ray.problem.detection import Detections
from de_ray.problem.detection_metrics import average_precision
from de_ray.problem.masks import decode, encode
from de_ray.problem.scenes import ITEMS, VISIBLE, Scenes, compose_scenes, single_items
from de_ray.problem.scenes_problem import build_segmenter
from de_ray.problem.scenes_teacher import _batch, learn_items

ITEM_COUNT = 40


def items(seed: int = 0) -> LabelledImages:
    """Filled rectangles in the place of Fashion-MNIST's items, normalised alike."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(ITEM_COUNT, 1, 28, 28)
    for image in images:
        left, top = torch.randint(8, (2,), generator=generator).tolist()
        image[0, top:28 - top, left:28 - left] = 1.0
    images = (images - 0.2860) / 0.3530
    labels = torch.arange(ITEM_COUNT) % 10
    return LabelledImages(images, labels, images, labels)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return compose_scenes(items().train, items().train_labels, 50, 96, 0)


def test_a_seed_draws_the_same_scenes_and_another_one_others(scenes):
    again, other = (compose_scenes(items().train, items().train_labels, 50, 96, seed) for seed in (0, 1))
    assert again.images.equal(scenes.images) and again.instances.equal(scenes.instances)
    assert not other.images.equal(scenes.images)
    assert scenes.images.shape == (50, 3, 96, 96) and scenes.images.dtype == scenes.instances.dtype == torch.uint8


def test_boxes_are_tight_around_masks_and_objects_are_numbered_through(scenes):
    assert len(scenes.rows) == len(scenes.classes) == len(scenes.boxes) and scenes.rows.diff().ge(0).all()
    assert scenes.rows.bincount(minlength=50).ge(1).all() and scenes.rows.bincount().max() <= ITEMS[1]
    for row in range(len(scenes)):
        boxes = scenes.boxes[scenes.rows == row]
        assert scenes.instances[row].max() == len(boxes)
        for number, box in enumerate(boxes.int().tolist(), start=1):
            mask = scenes.instances[row] == number
            left, top, right, bottom = box
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            assert mask[:, left].any() and mask[:, right - 1].any() and mask[top].any() and mask[bottom - 1].any()


def test_pixels_of_objects_are_the_bright_ones(scenes):
    bright = scenes.images.amax(1) > 110  # nothing of the background, all of a filled item
    assert ((scenes.instances > 0) == bright).float().mean() > 0.995


def test_later_items_hide_earlier_ones_but_not_too_much(scenes):
    shares = []
    for row in range(len(scenes)):
        for number, box in enumerate(scenes.boxes[scenes.rows == row].int().tolist(), start=1):
            left, top, right, bottom = box
            shares.append(float((scenes.instances[row, top:bottom, left:right] == number).float().mean()))
    assert min(shares) > VISIBLE / 2 and min(shares) < 0.95  # items are rectangles: a hole is another item
    assert sum(share > 0.99 for share in shares) > len(shares) / 2


def test_ground_truth_of_scenes_has_full_precision_by_boxes_and_masks(scenes):
    annotations = Annotations(scenes.coco(), ())
    found = []
    for row in range(len(scenes)):
        mine = scenes.rows == row
        masks = torch.stack([scenes.instances[row] == number for number in range(1, int(mine.sum()) + 1)])
        found.append(Detections(scenes.boxes[mine], torch.ones(len(masks)), scenes.classes[mine], encode(masks)))
    assert average_precision(found, annotations) == pytest.approx({"AP": 1, "AP50": 1})
    assert average_precision(found, annotations, "segm") == pytest.approx({"AP": 1, "AP50": 1})
    emptied = [Detections(each.boxes, each.scores, each.classes, encode(~decode(each.masks))) for each in found]
    assert average_precision(emptied, annotations, "segm")["AP50"] < 0.1


def test_a_mirrored_batch_has_its_labels_mirrored(scenes):
    rows = torch.tensor([3, 7, 3])
    images, labels = _batch(scenes, rows, torch.tensor([False, False, True]))
    assert images.shape == (3, 3, 96, 96) and images.max() <= 1
    assert images[2].equal(images[0].flip(2))
    first, last = (labels["bboxes"][labels["batch_idx"] == index] for index in (0, 2))
    torch.testing.assert_close(last[:, 0], 1 - first[:, 0])
    assert last[:, 1:].equal(first[:, 1:])
    counts = labels["batch_idx"].long().bincount()
    assert labels["masks"].flatten(1).amax(1).equal(counts.float())
    # A mask, in pixels of two, lies in its box.
    for image, masks in enumerate(labels["masks"]):
        for number, box in enumerate(labels["bboxes"][labels["batch_idx"] == image].tolist(), start=1):
            columns = (masks == number).any(0).nonzero()[:, 0] * 2
            assert columns.min() >= (box[0] - box[2] / 2) * 96 - 2 and columns.max() <= (box[0] + box[2] / 2) * 96 + 2


def test_single_items_are_painted_as_those_of_scenes_each_in_its_place():
    images = single_items(items().train, 48, torch.Generator().manual_seed(0))
    assert images.shape == (ITEM_COUNT, 3, 48, 48) and 0 <= images.min() and images.max() <= 1
    bright = images.amax(1) > 110 / 255
    corners = {tuple(mask.nonzero().amin(0).tolist()) for mask in bright}
    assert bright.flatten(1).float().mean(1).min() > 0.02 and len(corners) > ITEM_COUNT / 3
    assert single_items(items().train, 48, torch.Generator().manual_seed(0)).equal(images)


def test_a_backbone_learns_to_tell_items_apart_before_it_finds_them(monkeypatch):
    monkeypatch.setattr(scenes_teacher, "ITEM_EPOCHS", 4)
    monkeypatch.setattr(scenes_teacher, "ITEM_BATCH", 16)
    labels = torch.arange(240) % 2
    images = torch.full((240, 1, 28, 28), -0.8)
    for image, label in zip(images, labels, strict=True):
        image[0, slice(4, 24) if label else slice(11, 17), slice(11, 17) if label else slice(4, 24)] = 2.0
    network = build_segmenter()
    head = network.model[-1].cv3[0][0].conv.weight.clone()
    with threads(1):
        assert learn_items(network, images, labels, TeacherConfig(learning_rate=2e-3)) > 0.9
    assert network.model[-1].cv3[0][0].conv.weight.equal(head)


@pytest.mark.parametrize(("fields", "key"), [({"count": 0}, "scenes"), ({"size": 32}, "size")])
def test_sizes_out_of_range_name_the_key(fields, key):
    with pytest.raises(ValueError, match=rf"problem\.data\.{key}="):
        compose_scenes(items().train, items().train_labels, **{"count": 1, "size": 64, "seed": 0} | fields)


def config(**fields) -> ProblemConfig:
    values = {"name": "fashion_scenes", "divergence": "detection", "calibration_size": 8,
              "data": DataConfig(size=64, scenes=32), "teacher": TeacherConfig(epochs=1, batch=8, learning_rate=2e-3)}
    return ProblemConfig(**values | fields)


def test_a_teacher_learns_once_and_the_same_whatever_the_runs_seed(cache, monkeypatch, caplog):
    monkeypatch.setattr("de_ray.problem.scenes_problem.load_mnist", lambda name: items())
    caplog.set_level(logging.INFO)
    with threads(1):
        first = build_problem(config(), 0)
        assert "epoch 1 of 1" in caplog.text
        caplog.clear()
        second = build_problem(config(augment="detection"), 1)
    assert "epoch" not in caplog.text
    assert [path.suffix for path in (cache / "teachers").iterdir()] == [".safetensors"]
    ours, theirs = first.teacher.state_dict(), second.teacher.state_dict()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert ours.keys() == build_architecture(first.architecture).state_dict().keys()
    assert first.inputs.equal(second.inputs) and not first.calibration.equal(second.calibration)
    assert first.held_out.shape == (2, 3, 64, 64) and second.augment is not None
    metrics = first.metrics(first.teacher)
    assert metrics["mask_agreement_50"] == 1 and {"mask_AP", "mask_AP50", "mask_agreement_80"} <= metrics.keys()
    output = first.teacher(first.inputs[:2])
    assert first.divergence(output, output).eq(0).all()
    twin = pickle.loads(pickle.dumps(first))  # as actors are given it
    assert twin.metrics(twin.teacher) == metrics


@pytest.mark.parametrize(("fields", "message"), [
    ({"data": DataConfig(size=72)}, r"problem\.data\.size=72: expected a multiple of the largest stride, 32"),
    ({"include": ["conv7"]}, "conv7"),
])
def test_mistakes_are_found_before_training(fields, message, cache):
    with pytest.raises(ValueError, match=message):
        build_problem(config(**fields), 0)
    assert not (cache / "teachers").exists()
