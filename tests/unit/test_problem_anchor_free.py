import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from de_ray.problem import anchor_free_divergence
from de_ray.problem.anchor_free import AnchorFree, decode, detect, draw_masks, inside
from de_ray.problem.anchor_free_divergence import PIXELS, AnchorFreeDivergence
from de_ray.problem.bernoulli import bernoulli_kl
from de_ray.problem.detection import MOST, Detections, Letterbox
from de_ray.problem.detection_metrics import agreement, mask_overlap
from de_ray.problem.masks import cropped, encode, mask_iou
from de_ray.problem.masks import decode as decode_masks

BOXES_ALONE = AnchorFree(classes=2, bins=4, strides=(8, 16))
HEAD = AnchorFree(classes=2, bins=4, strides=(8, 16), coefficients=3)
KL = AnchorFreeDivergence(HEAD)


def outputs(seed: int, samples: int = 2, spread: float = 1.0, head: AnchorFree = HEAD) -> dict:
    """Random raw heads of images of 16 x 32 pixels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int, *shape: int) -> torch.Tensor:
        return spread * torch.randn(samples, channels, *shape, generator=generator)

    found = {"boxes": [draw(4 * head.bins, 2, 4), draw(4 * head.bins, 1, 2)],
             "scores": [draw(head.classes, 2, 4), draw(head.classes, 1, 2)]}
    if head.coefficients:
        found |= {"coefficients": [draw(head.coefficients, 2, 4), draw(head.coefficients, 1, 2)],
                  "prototypes": draw(head.coefficients, 4, 8)}
    return found


def moved(output: dict, key: str, size: float) -> dict:
    """The same but for one number of the second sample."""
    twin = {k: [one.clone() for one in v] if isinstance(v, list) else v.clone() for k, v in output.items()}
    (twin[key][0] if isinstance(twin[key], list) else twin[key])[1, 1, 1, 2] += size
    return twin


def empty(head: AnchorFree = HEAD) -> dict:
    """One image without objects."""
    output = outputs(0, 1, 0.0, head)
    for scores in output["scores"]:
        scores.fill_(-20)
    return output


def test_a_cell_is_decoded_to_its_box_and_score():
    output = empty(BOXES_ALONE)
    output["scores"][0][0, 1, 1, 2] = 2.0
    sides = output["boxes"][0].view(4, 4, 2, 4)[:, :, 1, 2]
    sides[0, 2] = sides[1, 1] = sides[2, 3] = 50.0  # left 2, top 1, right 3 strides for sure
    sides[3] = torch.tensor([-50.0, -50, 0, 0])  # bottom 2 or 3 strides, each as likely
    (found,) = detect(output, BOXES_ALONE)
    # The cell's centre is at (2.5, 1.5) strides of 8 pixels.
    torch.testing.assert_close(found.boxes, torch.tensor([[4.0, 4, 44, 32]]))
    torch.testing.assert_close(found.scores, torch.tensor([2.0]).sigmoid())
    assert found.classes.tolist() == [1] and found.masks is None
    boxes, scores = decode(output, BOXES_ALONE)
    assert boxes.shape == (1, 10, 4) and scores.shape == (1, 10, 2)


def test_masks_are_combined_from_prototypes_at_the_inputs_resolution_and_cut_to_their_boxes():
    prototypes = torch.zeros(2, 4, 8)
    prototypes[0], prototypes[1, :, 4:] = 1.0, 5.0
    masks = draw_masks(torch.tensor([[1.0, 0], [-1, 1]]), prototypes, torch.tensor([[4.0, 2, 12, 10], [0, 0, 99, 99]]),
                       (16, 32))
    assert masks.shape == (2, 16, 32)
    assert masks[0].nonzero().amin(0).tolist() == [2, 4] and masks[0].nonzero().amax(0).tolist() == [9, 11]
    assert masks[0].sum() == 64
    assert masks[1][:, 18:].all() and not masks[1][:, :14].any()
    assert draw_masks(torch.zeros(0, 2), prototypes, torch.zeros(0, 4), (16, 32)).shape == (0, 16, 32)


def test_a_pixel_is_inside_where_its_centre_is():
    within = inside(torch.tensor([[8.0, 0, 24, 4]]), (4, 8), (16, 32))  # pixels of 4 x 4
    assert within[0].nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [0, 5]]


def test_a_broken_student_gives_few_detections_and_no_error():
    noisy = outputs(0, spread=100.0)
    assert all(len(each) <= MOST and each.boxes.isfinite().all() for each in detect(noisy, HEAD))
    failed = {k: [torch.full_like(one, math.nan) for one in v] if isinstance(v, list) else v for k, v in noisy.items()}
    assert [len(each) for each in detect(failed, HEAD)] == [0, 0]


def test_outputs_of_another_shape_are_a_value_error():
    with pytest.raises(ValueError, match=r"a head's scores are \[2, 2, 2, 4\]: expected \[N, 3, H, W\]"):
        detect(outputs(0), AnchorFree(3, 4, (8, 16), 3))
    other = outputs(0) | {"scores": [torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 2, 2)]}
    with pytest.raises(ValueError, match="expected the same"):
        KL(outputs(0), other)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 8), st.floats(0.01, 8))
def test_the_divergence_is_never_negative_and_zero_for_equal_heads(seed, near, far):
    teacher, student = outputs(seed, spread=near), outputs(seed + 1, spread=far)
    value = KL(teacher, student)
    assert value.shape == (2,) and (value >= 0).all() and value.isfinite().all()
    assert KL(teacher, moved(teacher, "scores", 0.0)).eq(0).all()


@pytest.mark.parametrize("key", ["boxes", "scores", "coefficients", "prototypes"])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3, 5.0])
@pytest.mark.parametrize("drawn", [2, 32])  # masks of few cells pixel by pixel, or of all
def test_any_number_that_differs_makes_its_samples_divergence_positive(key, size, drawn, monkeypatch):
    monkeypatch.setattr(anchor_free_divergence, "DRAWN", drawn)
    teacher = outputs(0)
    value = KL(teacher, moved(teacher, key, size))
    assert value[0] == 0 and value[1] > 0


def test_the_terms_have_the_weights_of_the_chain_rule():
    teacher = outputs(3, 1)
    teacher["scores"][0][0, :, 1, 2] = torch.tensor([0.4, -1.0])
    present = torch.tensor(0.4).sigmoid()
    scored = moved({k: [v.repeat(2, 1, 1, 1) for v in value] if isinstance(value, list) else value.repeat(2, 1, 1, 1)
                    for k, value in teacher.items()}, "scores", 2.0)
    both = {k: [v.repeat(2, 1, 1, 1) for v in value] if isinstance(value, list) else value.repeat(2, 1, 1, 1)
            for k, value in teacher.items()}
    torch.testing.assert_close(KL(both, scored)[1], bernoulli_kl(torch.tensor(-1.0), torch.tensor(1.0)))
    before = both["boxes"][0][1, :4, 1, 2].log_softmax(0)  # of the left side
    shifted = moved(both, "boxes", 2.0)
    after = shifted["boxes"][0][1, :4, 1, 2].log_softmax(0)
    torch.testing.assert_close(KL(both, shifted)[1], present * (before.exp() * (before - after)).sum())
    emphasised = AnchorFreeDivergence(HEAD, emphasis=3.0)
    for student in (scored, shifted):
        torch.testing.assert_close(emphasised(both, student)[1], KL(both, student)[1] * (1 + 3 * present))


def test_a_mask_counts_for_its_pixels_and_those_in_the_box_most():
    teacher = outputs(3, 1)
    for scores in teacher["scores"]:
        scores.fill_(-30)
    teacher["scores"][0][0, 0, 1, 2] = 30.0  # one object, for sure
    student = {**teacher, "coefficients": [one.clone() for one in teacher["coefficients"]]}
    student["coefficients"][0][0, :, 1, 2] = 0
    logits = torch.einsum("m,mhw->hw", teacher["coefficients"][0][0, :, 1, 2], teacher["prototypes"][0])
    pixels = bernoulli_kl(logits, torch.zeros_like(logits))
    box = decode(teacher, HEAD)[0][0, 6]  # the cell is in the second row of four
    within = inside(box, (4, 8), (16, 32))
    torch.testing.assert_close(KL(teacher, student)[0], PIXELS * (0.9 * pixels[within].mean() + 0.1 * pixels.mean()))


def test_beyond_the_drawn_cells_masks_count_to_second_order(monkeypatch):
    teacher, student = outputs(5, spread=0.05), outputs(5, spread=0.05)
    student["coefficients"] = [one + 0.01 for one in student["coefficients"]]
    monkeypatch.setattr(anchor_free_divergence, "OUTSIDE", 1.0)  # the same weight for all pixels
    exact = KL(teacher, student)
    monkeypatch.setattr(anchor_free_divergence, "DRAWN", 0)
    torch.testing.assert_close(KL(teacher, student), exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_half_precision_are_compared_in_float32(dtype):
    teacher, student = ({k: [one.to(dtype) for one in v] if isinstance(v, list) else v.to(dtype)
                         for k, v in outputs(seed).items()} for seed in (0, 1))
    value = KL(teacher, student)
    assert value.dtype == torch.float32 and value.isfinite().all() and KL(teacher, teacher).eq(0).all()


def test_a_failed_student_has_a_divergence_that_is_not_finite():
    teacher = outputs(0)
    for key in teacher:
        assert KL(teacher, moved(teacher, key, math.nan)).isfinite().tolist() == [True, False]


def test_gradients_lead_to_the_teacher():
    teacher, student = outputs(0), outputs(1)
    leaves = [one.requires_grad_() for v in student.values() for one in (v if isinstance(v, list) else [v])]
    optimizer = torch.optim.Adam(leaves, 0.03)
    start = KL(teacher, student).sum().item()
    for _ in range(400):
        optimizer.zero_grad()
        loss = KL(teacher, student).sum()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * start


@pytest.mark.parametrize("drawn", [2, 32])
def test_the_scores_gradient_has_the_curvature_as_its_covariance(drawn, monkeypatch):
    monkeypatch.setattr(anchor_free_divergence, "DRAWN", drawn)
    head = AnchorFree(classes=1, bins=3, strides=(8,), coefficients=2)
    divergence = AnchorFreeDivergence(head)
    shapes = {"boxes": (12, 1, 3), "scores": (1, 1, 3), "coefficients": (2, 1, 3), "prototypes": (2, 2, 6)}
    sizes = [math.prod(shape) for shape in shapes.values()]

    def unpacked(flat: torch.Tensor) -> dict:
        parts = {key: part.reshape(-1, *shape) for (key, shape), part in
                 zip(shapes.items(), flat.split(sizes, -1), strict=True)}
        return {key: part if key == "prototypes" else [part] for key, part in parts.items()}

    flat = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(4))
    curvature = torch.autograd.functional.hessian(lambda s: KLsum(divergence, unpacked(flat), unpacked(s)), flat)
    generator, total = torch.Generator().manual_seed(0), torch.zeros(sum(sizes), sum(sizes))
    samples, passes = 100, 60
    for _ in range(passes):
        leaf = flat.repeat(samples, 1).requires_grad_()
        gradient = torch.autograd.grad(divergence.score(unpacked(leaf), generator), leaf)[0]
        total += gradient.T @ gradient / (samples * passes)
    unit = curvature.diagonal().clamp_min(1e-3).sqrt()
    difference = (total - curvature) / unit[:, None] / unit
    assert difference.abs().max() < 0.15 and difference.square().mean().sqrt() < 0.03


def KLsum(divergence, teacher, student):
    return divergence(teacher, student).sum()


def test_the_divergence_can_be_pickled():
    assert pickle.loads(pickle.dumps(KL))(outputs(0), outputs(1)).equal(KL(outputs(0), outputs(1)))


def bars(*columns: int) -> torch.Tensor:
    """Masks [D, 8, 10] of the columns from each number on, four wide."""
    masks = torch.zeros(len(columns), 8, 10, dtype=torch.bool)
    for mask, left in zip(masks, columns, strict=True):
        mask[:, left:left + 4] = True
    return masks


def test_masks_survive_encoding_and_overlap_as_their_pixels_do():
    masks = bars(0, 3, 6)
    assert decode_masks(encode(masks)).equal(masks)
    iou = mask_iou(encode(masks), encode(masks[:2]))
    torch.testing.assert_close(iou, torch.tensor([[1, 1 / 7], [1 / 7, 1], [0, 1 / 7]]))
    assert len(encode(masks[:0])) == 0 and mask_iou(encode(masks[:0]), encode(masks)).shape == (0, 3)


def test_letterboxing_is_undone_for_masks_too():
    letterbox = Letterbox(40, 20, 20)  # scaled to 20 x 10, below 5 grey rows
    masks = torch.zeros(1, 20, 20, dtype=torch.bool)
    masks[0, 5:10, 4:10] = True
    found = Detections(torch.tensor([[4.0, 5, 10, 10]]), torch.ones(1), torch.zeros(1, dtype=torch.long), encode(masks))
    undone = decode_masks(letterbox.undo(found).masks)
    expected = torch.zeros(1, 20, 40, dtype=torch.bool)
    expected[0, :10, 8:20] = True
    assert undone.equal(expected)
    assert len(cropped(np.empty(0, object), (0, 0), (1, 1), (1, 1))) == 0


def test_objects_may_agree_by_box_and_not_by_mask():
    def detections(*columns: int) -> Detections:
        count = len(columns)
        return Detections(torch.tensor([[0.0, 0, 10, 8]] * count), torch.full((count,), 0.9),
                          torch.arange(count), encode(bars(*columns)))

    teacher, student = detections(0, 3), detections(0, 6)
    assert agreement([teacher], [student])["agreement_80"] == 1
    by_mask = agreement([teacher], [student], mask_overlap)
    assert (by_mask["agreement_80"], by_mask["false_80"]) == (0.5, 1)


def test_a_box_whose_mask_is_empty_counts_among_boxes_alone():
    box, empty = torch.tensor([[0.0, 0, 10, 8]]), torch.zeros_like(bars(0))
    teacher, student = (Detections(box, torch.tensor([0.95]), torch.tensor([0]), encode(mask))
                        for mask in (bars(0), empty))
    assert agreement([teacher], [student])["agreement_80"] == 1 and agreement([], [])["false_80"] == 0
    assert agreement([Detections(box[:0], torch.zeros(0), torch.zeros(0).long(), encode(empty[:0]))],
                     [student])["false_80"] == 1
    assert agreement([teacher], [student], mask_overlap)["agreement_80"] == 0


def test_detections_keep_their_masks_when_some_are_taken():
    found = Detections(torch.zeros(3, 4), torch.tensor([0.9, 0.5, 0.3]), torch.arange(3), encode(bars(0, 3, 6)))
    assert decode_masks(found.above(0.4).masks).equal(bars(0, 3))
    assert decode_masks(found.at(slice(1, 2)).masks).equal(bars(3))
    assert decode_masks(found.at(torch.tensor([2, 0])).masks).equal(bars(6, 0))
