import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from de_ray.config import Config, ProblemConfig, RefitConfig, TeacherConfig
from de_ray.evolve import saliency_inputs
from de_ray.problem.augment import DISPLACED, REACH, augmentation, cutmix, shift, splice
from de_ray.problem.build import CLASSIFIERS, PROBLEMS, build_architecture, build_problem
from de_ray.problem.sampling import draw_batch, draw_inputs, draw_sample
from de_ray.refit.objective import Objective
from de_ray.student import Student

CONF = Path(__file__).parents[2] / "conf" / "problem"
PARAMETERS = {"digits_mlp": 50_826, "lenet300": 266_610, "lenet5": 431_080}


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_have_the_published_size_and_ten_logits(name):
    model = build_architecture(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    side = 8 if name == "digits_mlp" else 28
    assert model(torch.zeros(3, 1, side, side)).shape == (3, 10)


def test_an_architecture_that_a_file_merely_names_is_never_imported():
    with pytest.raises(ValueError, match="pass it to de_ray.load"):
        build_architecture("os:system")


def test_an_unknown_problem_is_a_value_error_listing_the_known_ones():
    with pytest.raises(ValueError, match="'mnist': expected one of digits, lenet300_mnist.*custom"):
        build_problem(ProblemConfig(name="mnist"), seed=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_has_a_config_that_fits_the_schema(name):
    fields = OmegaConf.merge(OmegaConf.structured(ProblemConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    if name == "custom":
        fields.model, fields.calibration = "package.module:build", "inputs.npy"
    assert OmegaConf.to_object(fields).name == name


def test_no_config_is_without_its_problem():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(PROBLEMS)


def test_digits_with_the_shipped_config_have_a_good_teacher_and_no_labels(cache):
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ProblemConfig),
                                                 OmegaConf.load(CONF / "digits.yaml")))
    problem = build_problem(config, seed=0)
    assert problem.metrics(problem.teacher)["accuracy"] >= 96
    assert not problem.teacher.training
    assert not any(parameter.requires_grad for parameter in problem.teacher.parameters())
    assert problem.weights == 64 * 256 + 256 * 128 + 128 * 10
    assert len(problem.calibration) == config.calibration_size
    tensors = [value for value in vars(problem).values() if isinstance(value, torch.Tensor)]
    assert [tensor.shape[1:] for tensor in tensors] == [(1, 8, 8)] * 3  # inputs alone


def test_the_runs_seed_draws_calibration_inputs_but_not_the_teacher(cache):
    quick = ProblemConfig(calibration_size=100, teacher=TeacherConfig(epochs=1))
    first, again, other = (build_problem(quick, seed) for seed in (0, 0, 1))
    assert first.calibration.equal(again.calibration)
    assert not first.calibration.equal(other.calibration)
    assert first.teacher.fc1.weight.equal(other.teacher.fc1.weight)


@pytest.mark.parametrize("fields", [{"include": ["fc9"]}, {"calibration_size": 1438}, {"inputs_size": 5000},
                                    {"inputs_size": 100}])
def test_unknown_layers_and_sizes_out_of_range_fail_before_training(fields, cache, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError):
        build_problem(ProblemConfig(**fields), seed=0)
    assert "epoch" not in caplog.text


def test_calibration_inputs_are_among_the_usable_ones_and_none_is_drawn_twice():
    inputs = torch.arange(50)
    usable, calibration = draw_inputs(inputs, 10, 20, seed=0)
    assert len(set(usable.tolist())) == 20
    assert len(set(calibration.tolist())) == 10
    assert set(calibration.tolist()) < set(usable.tolist())
    assert draw_inputs(inputs, 10, 0, seed=0)[0].equal(inputs)


def test_batches_and_samples_follow_the_chances():
    generator = torch.Generator().manual_seed(0)
    assert draw_sample(100, None, 200, generator).sort().values.equal(torch.arange(100))
    weighed = torch.where(torch.arange(100) < 10, 0.09, 0.1 / 90)
    batch = draw_batch(100, weighed, 10_000, generator)
    assert 0.87 < (batch < 10).float().mean() < 0.93
    assert draw_sample(100, weighed, 20, generator).unique().numel() == 20
    only = (torch.arange(100) < 10).float()
    assert draw_sample(100, only, 20, generator).sort().values.equal(torch.arange(10)), "as many as there are"


def test_saliency_and_refit_see_inputs_by_their_chances(cache):
    problem = build_problem(ProblemConfig(teacher=TeacherConfig(epochs=1)), seed=0)
    problem = replace(problem, chances=(torch.arange(len(problem.inputs)) < 10).float())
    seen = []

    def forward(inputs):
        seen.extend(inputs)
        return problem.teacher(inputs)

    sum(Objective(problem, RefitConfig(batch=64), torch.device("cpu")).parts(forward, torch.Generator()))
    assert len(seen) == 1 + 2 + 64, "one and two of them are measured before"
    drawn = saliency_inputs(problem, Config(), Student(problem.teacher, problem.layers), 0).inputs
    assert len(drawn) == 10
    seen.extend(drawn)
    assert all(any(one.equal(other) for other in problem.inputs[:10]) for one in seen)


def test_shift_moves_each_image_by_its_own_offset_and_fills_with_background():
    images = torch.full((400, 2, 9, 7), -0.5)
    images[:, 0, 4, 3], images[:, 1, 4, 3] = 1.0, 2.0
    moved = shift(images, torch.Generator().manual_seed(0), 0.5)
    assert moved.shape == images.shape
    offsets = []
    for image in moved:
        row, column = map(int, (image[0] == 1).nonzero()[0])
        offsets.append((row - 4, column - 3))
        expected = torch.full((2, 9, 7), -0.5)
        expected[0, row, column], expected[1, row, column] = 1.0, 2.0
        assert image.equal(expected)
    reach = range(-REACH, REACH + 1)
    assert set(offsets) == {(y, x) for y in reach for x in reach}
    # Half stay for sure, and of the others one in nine by chance: 222 of 400, give or take 10.
    assert 180 < offsets.count((0, 0)) < 264


def test_cutmix_pastes_one_rectangle_of_one_other_image_from_a_place_nearby():
    # Both axes count, so that a pixel tells where it comes from; the first channel says from which image.
    images = torch.stack(torch.broadcast_tensors(torch.arange(1.0, 401)[:, None, None], torch.arange(9.0)[:, None],
                                                 torch.arange(7.0)), 1)
    mixed = cutmix(images, torch.Generator().manual_seed(0), 0.5)
    inner = mixed[:, :, REACH:-REACH, REACH:-REACH]
    shares, offsets = [], set()
    for number, image in enumerate(inner, start=1):
        foreign = (image[0] != number) & (image[0] != 0)  # 0: background that a shift brought into the other image
        if foreign.any():
            shares.append(foreign.float().mean().item())
            assert len(image[0][foreign].unique()) == 1, "one other image"
            rows, columns = (foreign.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            assert rows == list(range(rows[0], rows[-1] + 1)) and columns == list(range(columns[0], columns[-1] + 1))
            for axis, size in ((0, 9), (1, 7)):
                offset = image[1 + axis, foreign] - foreign.nonzero()[:, axis] - REACH
                assert offset.abs().max() <= REACH + round(DISPLACED * size) + 1
                offsets.update(offset.tolist())
    assert 120 < len(shares) <= 220, "half of them, less the rectangles that lie at the edge or hold no pixel"
    assert max(shares) > 0.5 and len(offsets) > 5


@pytest.mark.parametrize(("shape", "axis"),
                         [((400, 30), 1), ((400, 3, 20), 2), ((400, 20, 20), 1), ((400, 2, 3, 9, 4), 3)])
def test_splice_takes_a_span_of_one_other_input_from_its_place_along_the_longest_axis(shape, axis):
    # A value tells whose it is, and which place it belongs to.
    place = torch.arange(torch.Size(shape[1:]).numel()).reshape(shape[1:])
    tokens = place + 10_000 * torch.arange(shape[0]).reshape(-1, *[1] * place.ndim)
    spliced = splice(tokens, torch.Generator().manual_seed(0), 0.5)
    assert spliced.dtype == tokens.dtype and (spliced % 10_000).equal(place.expand(shape))
    changed, lengths = 0, set()
    for number, owners in enumerate((spliced // 10_000).movedim(axis, 1).reshape(400, shape[axis], -1)):
        assert all(len(row.unique()) == 1 for row in owners), "a whole slice of the axis at once"
        foreign = (owners[:, 0] != number).nonzero().flatten().tolist()
        if foreign:
            assert len(owners[foreign].unique()) == 1 and foreign == list(range(foreign[0], foreign[-1] + 1))
            changed += 1
            lengths.add(len(foreign))
    assert 130 < changed <= 230 and len(lengths) > 5


@pytest.mark.parametrize("augment", [shift, cutmix, splice])
def test_augmentation_is_the_generators_and_leaves_its_input_alone(augment):
    images = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    kept = images.clone()
    results = [augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])
    assert images.equal(kept)


@pytest.mark.parametrize("augment", [shift, cutmix, splice])
def test_augmentation_runs_where_images_are_and_never_asks_for_their_values(augment):
    images = torch.empty(8, 1, 6, 6, device="meta")  # stands for a GPU, and holds no values
    made = augment(images, torch.Generator().manual_seed(0))
    assert made.device.type == "meta" and made.shape == images.shape


@pytest.mark.parametrize("inputs", [torch.ones(5, 6), torch.ones(5, 1, 8, 8, dtype=torch.int64)])
def test_what_is_no_image_is_spliced_and_shifting_it_is_a_value_error(inputs):
    with pytest.raises(ValueError, match="problem.augment='shift': expected images"):
        augmentation("shift", inputs)
    assert augmentation("none", inputs) is None
    assert augmentation("auto", inputs).func is augmentation("cutmix", inputs).func is splice
    assert augmentation("auto", torch.ones(5, 1, 8, 8)).func is cutmix


def test_single_numbers_are_augmented_by_nothing():
    assert augmentation("auto", torch.ones(5)) is None
    with pytest.raises(ValueError, match=r"problem\.augment='cutmix': expected inputs \[N, \.\.\.\], got \[5\]"):
        augmentation("cutmix", torch.ones(5))


def test_every_real_problem_names_its_data_set():
    assert {name: classifier.load.args[0] for name, classifier in CLASSIFIERS.items() if name != "digits"} == {
        "lenet300_mnist": "MNIST", "lenet5_mnist": "MNIST", "lenet300_fashion": "FashionMNIST",
        "lenet5_fashion": "FashionMNIST"}
