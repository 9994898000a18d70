"""Pictures of detections: marks are where the objects are, and what is missed shows."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from de_ray.problem.coco import GREY
from de_ray.problem.custom import problem_from_model
from de_ray.problem.detection import Detections, Letterbox
from de_ray.problem.detection_pictures import MOST, ROWS, DetectionPictures
from de_ray.problem.drawing import GAP, HEAD, PANEL, Mark, Scene, draw_scenes

SIZE = (80, 60)
SCALE = PANEL // 80
"""Pixels of a panel a pixel of an image of that size."""
NAMES = ("cat", "dog")


def rendered(figure):
    """uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def panel(figure, column, row=0):
    """The pixels of a panel of an image of `SIZE`."""
    left, top = GAP + column * (PANEL + GAP), HEAD + row * (60 * SCALE + GAP)
    return rendered(figure)[top:top + 60 * SCALE, left:left + PANEL].astype(int)


def red(pixels):
    """bool: what is missed is drawn in this colour; not the label's softened edges."""
    return (pixels[..., 0] > 200) & (pixels[..., 1] < 40) & (pixels[..., 2] < 60)


def coloured(pixels):
    """bool: not a shade of grey."""
    return pixels.max(-1) - pixels.min(-1) > 60


def scene(*columns, pixels=None):
    return Scene(np.full((60, 80, 3), 128, np.uint8) if pixels is None else pixels, SIZE, columns)


def found(*rows):
    """Detections of rows (left, top, right, bottom, score, class), best first."""
    table = torch.tensor(rows).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


class Stub:
    """Stands for metrics of images: what the teacher and another model detect is given."""

    def __init__(self, expected, student):
        self.expected, self._student = expected, student
        self.asked = None

    def detections(self, model, rows):
        self.asked = rows
        return [self._student[row] for row in rows]


def pictures(expected, student, images=None):
    letterboxes = [Letterbox(*SIZE, 64)] * len(expected)
    images = torch.full((len(expected), 3, 64, 64), GREY, dtype=torch.uint8) if images is None else images
    stub = Stub(expected, student)
    return DetectionPictures(stub, images, letterboxes, NAMES)({"student": nn.Identity()}), stub


def test_a_box_is_drawn_around_its_pixels_and_only_there():
    box = (20, 30, 50, 45)
    pixels = panel(draw_scenes(["a"], [scene([Mark(box, 0, "")])]), 0)
    rows, columns = coloured(pixels).nonzero()
    edges = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    # Without a label's text there is still its background: above the box, at its left.
    assert abs(edges[[0, 2, 3]] - SCALE * np.array([20, 50, 45])).max() <= 3
    assert coloured(pixels[SCALE * 30 - 1:SCALE * 30 + 1, SCALE * 22:SCALE * 48]).all()
    assert not coloured(pixels[SCALE * 31:SCALE * 44, SCALE * 21:SCALE * 49]).any()


def test_an_image_of_another_shape_is_drawn_whole_in_every_column():
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:20, :, 1] = pixels[20:, :, 2] = 255
    drawn = rendered(draw_scenes(["a", "b"], [Scene(pixels, (20, 40), ([], []))]))
    for left in (GAP, 2 * GAP + PANEL):
        upright = drawn[HEAD:HEAD + PANEL, left + PANEL // 4:left + 3 * PANEL // 4]
        assert (upright[2:PANEL // 2 - 12] == (0, 255, 0)).all() and (upright[PANEL // 2 + 12:-2] == (0, 0, 255)).all()
        assert (drawn[HEAD:HEAD + PANEL, left:left + PANEL // 4 - 2] == 255).all()


def test_a_box_of_a_letterboxed_image_lands_on_its_object_and_the_bars_are_cut_off():
    images = torch.full((1, 3, 64, 64), GREY, dtype=torch.uint8)
    images[:, :, 8:56] = 0  # 80 x 60 pixels at 0.8, bars of 8 above and below
    images[:, :, 24:40, 16:48] = 255  # in the image: 20, 20 to 60, 40
    figure, _ = pictures([found((20.0, 20, 60, 40, 0.9, 0))], [found()], images)
    teacher, student = panel(figure, 0), panel(figure, 1)
    assert (student[:4] == 0).all() and (student[-4:] == 0).all()  # no grey
    outline, white = coloured(teacher), (student == 255).all(-1) & ~red(student)
    rows, columns = white[SCALE * 10:].nonzero()
    assert abs(np.array([columns.min(), columns.max()]) - SCALE * np.array([20, 60])).max() <= SCALE
    rows, columns = outline[SCALE * 19:].nonzero()  # below the label
    assert abs(np.array([columns.min(), columns.max(), rows.max() + SCALE * 19])
               - SCALE * np.array([20, 60, 40])).max() <= 3


def test_images_of_floats_are_drawn_as_those_of_bytes():
    images = torch.randint(256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drawn = [rendered(pictures([found()], [found()], each)[0]) for each in (images, images / 255)]
    assert (drawn[0] == drawn[1]).all()


BOX = (20.0, 20, 60, 40)


@pytest.mark.parametrize(("teacher", "student", "missed"), [
    ((*BOX, 0.9, 0), (*BOX, 0.25, 0), False),
    ((*BOX, 0.9, 0), (*BOX, 0.24, 0), True),
    ((*BOX, 0.9, 0), (*BOX, 0.9, 1), True),
    ((*BOX, 0.9, 0), (60.0, 20, 79, 40, 0.9, 0), True),
    ((*BOX, 0.79, 0), (60.0, 20, 79, 40, 0.9, 0), False),
])
def test_a_confident_object_that_the_student_misses_is_marked_in_its_column(teacher, student, missed):
    figure, _ = pictures([found(teacher)], [found(student)])
    columns = [panel(figure, column) for column in (0, 1)]
    assert not red(columns[0]).any() and red(columns[1]).any() == missed
    below = red(columns[1][SCALE * 40 - 2:SCALE * 40 + 2, SCALE * 20:SCALE * 60]).any(0)
    if missed:
        assert 0.4 < below.mean() < 0.9  # dashed
    labels = [text.get_text() for text in figure.axes[1].texts]
    assert ("missed: cat 0.90" in labels) == missed
    confident = teacher[4] > 0.8
    assert [text.get_text() for text in figure.texts[:2]] == [
        f"teacher: {'1 object' if confident else '0 objects'} above 0.8",
        f"student: {int(confident and not missed)} of them found"]


def test_what_no_one_should_see_is_not_drawn():
    figure, _ = pictures([found((*BOX, 0.25, 1), (*BOX, 0.2, 0))], [found((*BOX, 0.1, 0))])
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["dog 0.25"], []]


def test_of_a_broken_students_hundreds_of_detections_the_best_are_drawn():
    many = found(*[(i % 70, i % 50, i % 70 + 9, i % 50 + 9, 0.9 - i / 1000, 1) for i in range(300)])
    figure, _ = pictures([found((*BOX, 0.9, 0))], [many])
    labels = [text.get_text() for text in figure.axes[1].texts]
    assert len(labels) == 1 + MOST and labels[0] == "missed: cat 0.90" and labels[1] == "dog 0.90"


def test_the_teacher_chooses_the_images_with_the_most_confident_objects():
    counts = [0, 2, 1, 3, 0, 2, 1, 1, 1]
    expected = [found(*[(*BOX, 0.9, 0)] * count) for count in counts]
    figure, stub = pictures(expected, [found(*[(*BOX, 0.9, 1)] * 9)] * len(counts))
    assert stub.asked == [3, 1, 5, 2, 6, 7] and len(figure.axes) == 2 * ROWS
    few, stub = pictures(expected[:2], expected[:2])
    assert stub.asked == [1, 0] and len(few.axes) == 4


def test_a_mask_tints_its_pixels_and_leaves_the_others():
    mask = np.zeros((30, 40), bool)  # at half the resolution
    mask[10:20, 10:15] = True
    plain, tinted = (panel(draw_scenes(["a"], [scene([Mark((20, 20, 60, 40), 0, "", mask=each)])]), 0)
                     for each in (None, mask))
    differs = (plain != tinted).any(-1)[SCALE * 21:SCALE * 39, SCALE * 21:SCALE * 59]  # inside the box
    assert differs[:, :SCALE * 9 - 3].all() and not differs[:, SCALE * 9 + 3:].any()
    inside = tinted[SCALE * 30, SCALE * 25]
    assert coloured(inside) and (inside > 30).any()  # the grey shines through
    assert (tinted[SCALE * 30, SCALE * 50] == 128).all()


def test_labels_make_way_for_each_other_and_stay_in_the_panel():
    boxes = [(0, 0, 50, 30), (1, 1, 52, 33), (0, 2, 50, 29), (70, 50, 80, 60)]
    figure = draw_scenes(["a"], [scene([Mark(box, index, f"$thing_{{$ {index}") for index, box in enumerate(boxes)])])
    rendered(figure)
    renderer = figure.canvas.get_renderer()
    frame = figure.axes[0].get_window_extent(renderer)
    texts = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert len(texts) == 4
    for text in texts:
        assert frame.x0 <= text.x0 and text.x1 <= frame.x1 and frame.y0 <= text.y0 and text.y1 <= frame.y1
    assert not any(a.overlaps(b) for a, b in combinations(texts, 2))


def test_classes_differ_in_colour_and_none_is_the_missed_ones_red():
    colours = set()
    for kind in range(20):
        pixels = panel(draw_scenes(["a"], [scene([Mark((20, 30, 50, 45), kind, "")])]), 0)
        assert not red(pixels).any()
        colours.add(tuple(pixels[SCALE * 45, SCALE * 35]))
    assert len(colours) == 20


def test_a_network_that_is_no_detector_has_no_pictures():
    model = nn.Sequential(nn.Linear(3, 2))
    assert problem_from_model(model, torch.randn(20, 3), divergence="mse", held_out=None, include=["*"], exclude=[],
                              seed=0).pictures is None
