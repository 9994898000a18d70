"""Refit: masks hold, closed form is optimal, distillation resumes exactly."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from de_ray.backoff import Backoff
from de_ray.config import Config, EvolutionConfig, PoolConfig, RefitConfig
from de_ray.evaluation.build import build_pool
from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.gram import layer_grams, layer_rows
from de_ray.evolve import evolve
from de_ray.problem.custom import problem_from_model
from de_ray.problem.measure import mean_divergence
from de_ray.refit.build import LEAST_SHARE, NoRefit, build_refit
from de_ray.refit.distill import Distiller
from de_ray.refit.least_squares import refit_rows
from de_ray.refit.objective import Objective
from de_ray.refit.optimizer import Adam
from de_ray.student import Student
from tests.networks import branchy_problem, mlp_problem


def halved(problem):
    """A student with every second weight of each layer zeroed."""
    student = Student(problem.teacher, problem.layers)
    student.commit(tuple(ZeroingSet(i, np.arange(0, layer.size, 2)) for i, layer in enumerate(problem.layers)))
    return student


@pytest.mark.parametrize("layer", [
    nn.Linear(6, 4), nn.Conv1d(6, 4, 3, stride=2, padding=1), nn.Conv2d(6, 4, (3, 2), padding=(1, 0), dilation=(1, 2)),
    nn.Conv2d(6, 4, 3, groups=2, padding="same"), nn.Conv2d(6, 4, 3, padding=2, padding_mode="circular"),
    nn.Conv3d(6, 4, 2, stride=2),
])
def test_layer_rows_times_the_weight_are_the_layers_outputs(layer):
    torch.manual_seed(0)
    inputs = torch.randn(3, *((6,) if isinstance(layer, nn.Linear) else (6,) + (8,) * (layer.weight.ndim - 2)))
    rows = layer_rows(layer, inputs)  # [G, P, D]
    weight = layer.weight.reshape(len(rows), -1, rows.shape[-1])  # [G, R / G, D]
    products = torch.einsum("gpd,grd->pgr", rows, weight).flatten(1) + layer.bias
    expected = layer(inputs)
    if expected.ndim > 2:
        expected = expected.flatten(2).transpose(1, 2).reshape(-1, 4)
    torch.testing.assert_close(products, expected)


def test_grams_do_not_depend_on_the_batch():
    problem = branchy_problem()
    student = Student(problem.teacher, problem.layers)
    for a, b in zip(layer_grams(student, problem.inputs, 4), layer_grams(student, problem.inputs, 32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("make", [branchy_problem, mlp_problem])
@pytest.mark.parametrize(("method", "share"), [("distill", 0.5), ("least_squares", 0.5), ("obs", 0.8)])
def test_refit_lowers_the_divergence_and_holds_the_masks(make, method, share):
    problem = make()
    student = halved(problem)
    before = mean_divergence(problem, student.module, problem.calibration)
    refit = build_refit(student, problem, RefitConfig(method=method, steps=60, batch=32))
    refit.after_cycle(torch.Generator().manual_seed(0))
    assert mean_divergence(problem, student.module, problem.calibration) < share * before
    for weight, mask in zip(student.weights, student.masks, strict=True):
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).any()


def test_the_teacher_runs_once_an_input_where_inputs_stay_and_not_before_a_step_is_taken():
    problem = mlp_problem()
    seen = []
    handle = problem.teacher.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    objective = Objective(problem, RefitConfig(batch=16), torch.device("cpu"))
    assert not seen
    for _ in range(3):
        sum(objective.parts(copy.deepcopy(problem.teacher), torch.Generator().manual_seed(0)))
    handle.remove()
    # The copies that stand for students count too: 16 inputs each, and of the first three more, by which its
    # activations are measured.
    assert sum(seen) - 3 * 16 - 3 == 1 + len(problem.inputs)


def test_refit_in_bfloat16_lowers_the_divergence_and_keeps_float32_weights(bfloat16):
    problem = branchy_problem()
    student = halved(problem)
    before = mean_divergence(problem, student.module, problem.calibration)
    config = RefitConfig(steps=60, batch=32, precision="bfloat16")
    build_refit(student, problem, config).after_cycle(torch.Generator().manual_seed(0))
    assert mean_divergence(problem, student.module, problem.calibration) < before / 2
    assert all(weight.dtype == torch.float32 for weight in student.weights)


def test_relative_steps_follow_the_size_of_each_tensors_survivors():
    small, large = torch.full((4, 4), 0.01), torch.full((4, 4), 5.0)
    large[2:] = 0.0  # zeroed weights do not count
    former = small.clone(), large.clone()
    optimizer = Adam([small, large], relative=True)
    small.grad, large.grad = torch.full((4, 4), 1e-3), torch.full((4, 4), 20.0)
    optimizer.step(0.1)  # Adam's first step is the learning rate, whatever the gradient
    torch.testing.assert_close(former[0] - small, torch.full((4, 4), 0.001), rtol=1e-4, atol=0)
    torch.testing.assert_close(former[1] - large, torch.full((4, 4), 0.5), rtol=1e-4, atol=0)


def test_absolute_steps_have_one_size():
    tensors = torch.full((4,), 0.01), torch.full((4,), 5.0), torch.zeros(4)
    former = [tensor.clone() for tensor in tensors]
    optimizer = Adam(tensors, relative=False)
    for tensor in tensors:
        tensor.grad = torch.ones(4)
    optimizer.step(0.1)
    for tensor, was in zip(tensors, former, strict=True):
        torch.testing.assert_close(was - tensor, torch.full((4,), 0.1), rtol=1e-4, atol=0)


def test_relative_steps_of_a_tensor_of_next_to_nothing_still_move_it():
    tiny, *usual = torch.full((4,), 1e-12), torch.full((4,), 0.5), torch.full((4,), 5.0)
    optimizer = Adam([tiny, *usual], relative=True)
    tiny.grad = torch.ones(4)
    optimizer.step(0.1)
    torch.testing.assert_close(tiny, torch.full((4,), -0.1 * 0.5e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("others", "usual"), [([], 1.0), ([0.01, 0.2, 5.0], 0.2)])
def test_relative_steps_of_a_tensor_of_zeros_are_those_of_the_others(others, usual):
    empty, others = torch.zeros(3), [torch.full((3,), size) for size in others]
    optimizer = Adam([empty, *others], relative=True)
    empty.grad = torch.ones(3)
    optimizer.step(0.1)
    torch.testing.assert_close(empty, torch.full((3,), -0.1 * usual), rtol=1e-4, atol=0)


def test_a_networks_function_does_not_depend_on_the_unit_of_its_hidden_layer_when_steps_are_relative():
    """Scaling one layer up and the next one down leaves a ReLU network's function alone, and so it should its refit."""
    found = []
    for factor in (1.0, 256.0):
        problem = mlp_problem()
        student = halved(problem)
        student.weights[0].data.mul_(factor)
        student.module.get_submodule(student.layers[0].name).bias.data.mul_(factor)
        student.weights[1].data.div_(factor)
        refit = build_refit(student, problem, RefitConfig(steps=20, learning_rate=1e-2, batch=32, relative=True))
        refit.after_cycle(torch.Generator().manual_seed(0))
        found.append(mean_divergence(problem, student.module, problem.calibration))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def evolved(problem, final_steps=0, **refit):
    """A student after three cycles of magnitude, and their history."""
    evolution = EvolutionConfig(criteria=["magnitude"], generations=0, cycles=3, schedule="exponential", sparsity=0.6)
    config = Config(evolution=evolution, pool=PoolConfig("serial"),
                    refit=RefitConfig(final_steps=final_steps, batch=32, **refit))
    student = Student(problem.teacher, problem.layers)
    with build_pool(problem, config.pool, student) as pool:
        return student, evolve(problem, config, student, pool, None, {}, lambda record, total: None)


def test_refits_that_do_harm_are_undone():
    problem = mlp_problem()
    without, expected = evolved(problem, method="none")
    student, history = evolved(problem, steps=5, learning_rate=100.0)
    for name, value in without.state().items():
        torch.testing.assert_close(student.state()[name], value, rtol=0, atol=0)
    assert [record["divergence"] for record in history] == [record["divergence"] for record in expected]
    _, harmed = evolved(problem, steps=5, learning_rate=100.0, backoff=False)
    assert harmed[-1]["divergence"] > 2 * history[-1]["divergence"]


def test_a_refit_that_ends_in_nan_is_undone_and_one_that_does_not_back_off_says_what_to_lower():
    _, expected = evolved(mlp_problem(), method="none")
    student, history = evolved(mlp_problem(), steps=5, learning_rate=1e30)
    assert [record["divergence"] for record in history] == [record["divergence"] for record in expected]
    assert all(value.isfinite().all() for value in student.state().values())
    with pytest.raises(FloatingPointError, match=r"refit\.learning_rate"):
        evolved(mlp_problem(), steps=5, learning_rate=1e30, backoff=False)


@pytest.mark.parametrize("between", [0, 5])
def test_last_steps_that_do_harm_are_taken_again_at_smaller_rates(between):
    """The rate that tears the student apart is the first for them where there are no steps between cycles."""
    _, before = evolved(mlp_problem(), steps=between, learning_rate=50.0)
    _, history = evolved(mlp_problem(), final_steps=60, steps=between, learning_rate=50.0)
    assert history[-1]["divergence"] < before[-1]["divergence"]
    _, harmed = evolved(mlp_problem(), final_steps=60, steps=0, learning_rate=50.0, backoff=False)
    assert harmed[-1]["divergence"] > 2 * history[-1]["divergence"]


def test_last_steps_that_do_harm_at_any_rate_are_left_out():
    without, before = evolved(mlp_problem(), steps=0)
    student, history = evolved(mlp_problem(), final_steps=5, steps=0, final_learning_rate=1e9)
    assert len(history) == len(before) + 1 and history[-1]["divergence"] == before[-1]["divergence"]
    for name, value in without.state().items():
        torch.testing.assert_close(student.state()[name], value, rtol=0, atol=0)


class Number:
    """A student that is its divergence, and a pool of it."""

    batches = 1

    def __init__(self, divergence):
        self.divergence = divergence

    def values(self):
        return self.divergence

    def set_values(self, values):
        self.divergence = values

    def refresh(self, student):
        assert student is self

    def evaluate(self, candidates, batches):
        return np.array([self.divergence])


class Told(NoRefit):
    """A refit whose steps leave a `Number` as they are told to, one after the other."""

    backs_off = True

    def __init__(self, student, *divergences):
        self.student, self.divergences, self.steps = student, iter(divergences), []
        self.slower = self.annealed = 0
        self.slowest = 100

    def final(self, start, stop, generator):
        self.steps.append((start, stop, float(torch.rand((), generator=generator))))
        self.student.divergence = next(self.divergences)

    def slow_down(self):
        self.slower += 1
        return self.slower < self.slowest

    def anneal(self):
        self.annealed += 1


@pytest.mark.parametrize(("last", "made", "found", "slower"), [
    (False, [3.9], 3.9, 0), (False, [4.1, 0.5], 0.5, 1), (True, [1.1, 1.01, 0.9], 0.9, 2), (True, [1.0], 1.0, 0),
    (True, [np.nan, 2.0, np.inf, 1.2], 1.0, 4)])
def test_what_last_steps_may_leave_and_how_often_they_are_taken_again(last, made, found, slower, caplog):
    student = Number(1.0)
    refit = Told(student, *made, 0.0)
    backoff = Backoff(refit, student, student, 1e-3)
    assert backoff.final(0, 10, last, 1.0, torch.Generator().manual_seed(0)) == found == student.divergence
    assert refit.slower == slower and refit.annealed == 1
    assert refit.steps == [refit.steps[0]] * len(made), "the same steps, with the same draws"
    assert ("after the last cycle is left out" in caplog.text) == (slower == 4)
    backoff.final(10, 20, True, student.divergence, torch.Generator())
    assert refit.annealed == 1


@pytest.mark.parametrize(("made", "found"), [
    ([[3.0], [3.9], [3.8, 3.7, 3.6, 3.5]], 1.0),  # 3.9 is less than four times what was before the first
    ([[3.0], [5.0, 4.1, 2.0], [1.2, 0.9]], 0.9), ([[0.1], [0.5]], 0.5)])
def test_last_steps_are_measured_by_what_was_before_the_first_of_them(made, found):
    student = Number(1.0)
    backoff = Backoff(Told(student, *sum(made, [])), student, student, 1e-3)
    for part in range(len(made)):
        last = backoff.final(10 * part, 10 * part + 10, part == len(made) - 1, student.divergence,
                             torch.Generator())
    assert last == found == student.divergence


def test_what_was_before_the_last_steps_outlives_a_checkpoint():
    student = Student(mlp_problem().teacher, mlp_problem().layers)
    pool = Number(1.0)
    pool.refresh = lambda student: None
    refit = Told(pool, 2.0)
    first = Backoff(refit, student, pool, 1e-3)
    assert first.state() == {}
    before = student.values()
    first.final(0, 10, False, 1.0, torch.Generator())
    with torch.no_grad():
        student.weights[0].mul_(3)
    refit.divergences = iter([1.5] * 4)
    second = Backoff(refit, student, pool, 1e-3)
    second.load_state({**student.state(), **first.state()})
    second.final(10, 20, True, 2.0, torch.Generator())
    assert all(torch.equal(value, before[name]) for name, value in student.values().items())


def test_steps_are_not_taken_again_at_the_least_rate_and_may_heal_what_is_not_finite():
    student = Number(1.0)
    refit = Told(student, 9.0, 9.0)
    refit.slowest = 2
    assert Backoff(refit, student, student, 1e-3).final(0, 10, True, 1.0, torch.Generator()) == 1.0
    assert refit.slower == 2
    for before in (np.nan, np.inf):
        student = Number(before)
        assert Backoff(Told(student, 7.0), student, student, 1e-3).final(0, 10, True, before, torch.Generator()) == 7.0


def test_steps_that_leave_next_to_nothing_are_never_undone():
    student = Number(1e-9)
    assert Backoff(Told(student, 9e-4), student, student, 1e-3).final(0, 1, True, 1e-9, torch.Generator()) == 9e-4


def test_a_rate_that_does_harm_at_first_is_lowered_until_refits_help():
    _, stuck = evolved(mlp_problem(), method="none")
    _, history = evolved(mlp_problem(), steps=40, learning_rate=0.5)
    assert history[-1]["divergence"] < stuck[-1]["divergence"] / 2


def test_the_rate_falls_by_four_and_rises_by_two_and_outlives_a_checkpoint(monkeypatch):
    taken = []
    monkeypatch.setattr(Distiller, "run", lambda self, steps, rate, generator: taken.append((rate(0), rate(steps - 1))))

    def built(**config):
        problem = mlp_problem()
        return build_refit(halved(problem), problem, RefitConfig(learning_rate=0.1, steps=7, final_steps=10, **config))

    def rates(refit, **config):
        refit.after_cycle(torch.Generator())
        last = built(**config)
        last.load_state(refit.state())
        last.anneal()
        last.final(0, 10, torch.Generator())
        (between, still), (peak, _) = taken[-2:]
        assert still == between
        return between, peak

    refit = built()
    assert rates(refit) == pytest.approx((0.1, 0.1))
    refit.slow_down()
    assert rates(refit) == pytest.approx((0.1 / 4, 0.1))
    refit.slow_down()
    assert rates(refit) == pytest.approx((0.1 / 16, 0.1 / 4))
    refit.speed_up()
    assert rates(refit) == pytest.approx((0.1 / 8, 0.1 / 2))
    other = built()
    other.load_state(refit.state())
    assert rates(other) == pytest.approx((0.1 / 8, 0.1 / 2))
    for _ in range(30):
        other.speed_up()
        refit.slow_down()
    assert rates(other) == pytest.approx((0.1, 0.1))
    assert rates(refit) == pytest.approx((0.1 * LEAST_SHARE, 0.4 * LEAST_SHARE))
    refit = built(final_learning_rate=0.3)
    refit.slow_down()
    assert rates(refit, final_learning_rate=0.3) == pytest.approx((0.1 / 4, 0.3))
    assert not built(backoff=False).backs_off and built().backs_off


def test_least_squares_with_all_weights_alive_finds_the_teacher_again():
    problem = mlp_problem()
    student = Student(problem.teacher, problem.layers)
    for weight in student.weights:
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    refit_rows(problem, student, problem.inputs, 1e-9, 64)
    for weight, layer in zip(student.weights, problem.layers, strict=True):
        torch.testing.assert_close(weight.data, problem.teacher.get_submodule(layer.name).weight.data,
                                   rtol=1e-3, atol=1e-4)


def test_inputs_are_augmented_where_networks_run():
    problem, seen = mlp_problem(), []

    def augment(inputs, generator):
        seen.append(inputs.device.type)
        return inputs

    problem = dataclasses.replace(problem, augment=augment)
    device = torch.device("meta")  # stands for a GPU
    objective = Objective(problem, RefitConfig(batch=8), device)
    assert sum(objective.parts(copy.deepcopy(problem.teacher).to(device), torch.Generator())).device.type == "meta"
    assert seen == ["meta"]


def test_none_leaves_the_student_alone():
    problem = mlp_problem()
    student = halved(problem)
    before = copy.deepcopy(student.state())
    build_refit(student, problem, RefitConfig(method="none")).after_cycle(torch.Generator())
    assert all(torch.equal(value, before[key]) for key, value in student.state().items())


def test_distillation_continued_from_its_state_is_the_same_distillation():
    problem = mlp_problem()
    rate = lambda step: 1e-3  # noqa: E731
    whole = halved(problem)
    distiller = Distiller(whole, problem, RefitConfig(batch=16))
    for part in range(2):
        distiller.run(5, rate, torch.Generator().manual_seed(part))
    broken = halved(problem)
    first = Distiller(broken, problem, RefitConfig(batch=16))
    first.run(5, rate, torch.Generator().manual_seed(0))
    saved, moments = broken.state(), first.state()
    continued = Student(problem.teacher, problem.layers)
    continued.load_state(saved)
    second = Distiller(continued, problem, RefitConfig(batch=16))
    second.load_state(moments)
    second.run(5, rate, torch.Generator().manual_seed(1))
    for key, value in whole.state().items():
        assert torch.equal(value, continued.state()[key]), key


def test_a_diverging_distillation_is_an_error_that_says_what_to_lower():
    problem = branchy_problem()
    with pytest.raises(FloatingPointError, match="refit.learning_rate"):
        Distiller(halved(problem), problem, RefitConfig(batch=8)).run(40, lambda step: 1e30, torch.Generator())


@pytest.mark.parametrize("augmented", [False, True])
def test_workers_share_a_batch_as_one_would_have_it(augmented):
    """Gradients of the parts average to that of the whole."""
    problem = mlp_problem()
    if augmented:
        problem = dataclasses.replace(problem, augment=lambda x, g: x + torch.randn(x.shape, generator=g))
    config = RefitConfig(batch=12)

    def gradient(share):
        module = copy.deepcopy(problem.teacher).requires_grad_(True)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.9)
        objective = Objective(problem, config, torch.device("cpu"), share)
        objective.backward(module, torch.Generator().manual_seed(0))
        return [parameter.grad for parameter in module.parameters()]

    parts = [gradient((rank, 3)) for rank in range(3)]
    for whole, *grads in zip(gradient((0, 1)), *parts, strict=True):
        torch.testing.assert_close(sum(grads) / 3, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_batch_whose_activations_do_not_fit_goes_in_parts_with_the_same_gradient(augmented):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 20_000), nn.ReLU(), nn.Linear(20_000, 3))  # 80 kB a sample and activation
    problem = problem_from_model(wide, torch.randn(80, 8), divergence="mse", augment="cutmix" if augmented else "none")
    student = Student(problem.teacher, problem.layers)
    student.commit([ZeroingSet(0, np.arange(1000))])
    sizes, gradients = [], []
    student.module.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    student.module.requires_grad_(True)
    for memory_mb in (1, 4096):
        objective = Objective(problem, RefitConfig(batch=50, memory_mb=memory_mb), torch.device("cpu"))
        for _ in range(2):
            student.module.zero_grad()
            loss = objective.backward(student.module, torch.Generator().manual_seed(0))
        gradients.append([loss, *(parameter.grad for parameter in student.module.parameters())])
    measured, parts = sizes[:2], sizes[2:sizes.index(50) - 2]
    assert measured == [1, 2] and max(parts) <= 2**20 / 80_000 and sum(parts) == 2 * 50, "measured once"
    assert max(parts) - min(parts) <= max(parts) / 2, "about equal"
    for split, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-7)


class Residual(nn.Module):
    """A residual layer, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if self.in_place:
            x += self.second(x)
        else:
            x = x + self.second(x)
        return self.last(x)


def test_least_squares_sees_what_layers_saw_whatever_is_done_in_place_later():
    found = []
    for in_place in (False, True):
        torch.manual_seed(1)
        problem = problem_from_model(Residual(in_place), torch.randn(400, 8), divergence="mse")
        student = halved(problem)
        build_refit(student, problem, RefitConfig(method="least_squares")).after_cycle(torch.Generator().manual_seed(0))
        found.append(mean_divergence(problem, student.module, problem.calibration))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
