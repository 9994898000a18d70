"""Mistakes and odd networks that once ended late, wrong or silently."""

import copy
import decimal

import numpy as np
import pytest
import torch
from torch import nn

import de_ray
from de_ray.codec import DamagedFileError, encode, tables
from de_ray.codec.header import Entry, Reader, read_entries, write_entries
from de_ray.config import Config, EvolutionConfig, PoolConfig, QuantizationConfig, RefitConfig
from de_ray.pipeline import run
from de_ray.problem.custom import problem_from_model
from de_ray.problem.measure import mean_divergence
from de_ray.quantization.choose import choose_exponents
from de_ray.rate import measure_rate
from de_ray.refit.build import build_refit
from de_ray.session import run_session
from de_ray.student import Student
from tests.networks import mlp_problem

QUICK = {"evolution": EvolutionConfig(cycles=2, population=4, generations=1), "refit": RefitConfig(steps=5, final_steps=5),
         "quantization": QuantizationConfig(refit_steps=5)}


def compress(model, inputs, **arguments):
    return de_ray.compress(model, inputs, **{**QUICK, "sparsity": 0.5, **arguments})


def test_the_coders_tables_do_not_depend_on_the_callers_decimal_context():
    with decimal.localcontext(decimal.Context(prec=6, rounding=decimal.ROUND_DOWN)):
        assert np.array_equal(tables._squash(), tables.SQUASH)


def test_a_tensor_of_too_many_dimensions_is_refused_before_it_is_written():
    with pytest.raises(ValueError, match="counter has 9 dimensions: expected at most 8"):
        encode([], {"counter": torch.zeros([1] * 9)})


def test_a_file_that_does_not_fit_changes_nothing_of_the_module(tmp_path):
    path = compress(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(60, 8)).save(tmp_path / "a")
    other = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"2 of 4 tensors differ in name or shape \(2.weight, 2.bias\)"):
        de_ray.load(path, model=other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


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
        student = Student(problem.teacher, problem.layers)
        for mask, weight in zip(student.masks, student.weights, strict=True):
            mask.view(-1)[::2] = False
            weight.data.mul_(mask)
        build_refit(student, problem, RefitConfig(method="least_squares")).after_cycle(torch.Generator().manual_seed(0))
        found.append(mean_divergence(problem, student.module, problem.calibration))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_level_tables_are_no_cost_of_places():
    problem = mlp_problem()
    student = Student(problem.teacher, problem.layers)
    for mask, weight in zip(student.masks, student.weights, strict=True):
        mask.view(-1)[::16] = False
        weight.data.mul_(mask)
    assert (measure_rate(student, QuantizationConfig(bits=4), priced=False).gains < 4).all()


def test_a_layer_with_a_level_for_each_survivor_gets_no_row_scales():
    rng, settings = np.random.default_rng(0), QuantizationConfig(bits=8)
    for _ in range(8):
        weight = (rng.standard_normal((10, 84)) * rng.uniform(0.2, 5, (10, 1))).astype(np.float32)
        weight[rng.random(weight.shape) > 0.05] = 0
        assert choose_exponents(weight, 8, settings, de_ray.codec.coded_bytes) is None


def test_a_refit_of_levels_that_diverges_says_what_to_lower():
    config = Config(evolution=EvolutionConfig(sparsity=0.5, cycles=1, population=4, generations=1),
                    pool=PoolConfig(kind="serial"), refit=RefitConfig(steps=2, final_steps=2, batch=16),
                    quantization=QuantizationConfig(bits=4, refit_steps=20, learning_rate=1e30))
    with pytest.raises(FloatingPointError, match="lower quantization.learning_rate"):
        run(mlp_problem(), config)


@pytest.mark.parametrize("model", [nn.Linear(8, 1), nn.Sequential(nn.Linear(8, 4), nn.Unflatten(1, (1, 4)))])
def test_kl_of_a_single_class_is_refused_since_any_outputs_would_be_equal(model):
    with pytest.raises(ValueError, match=r"C >= 2 classes, got \[8, 1.*use mse or cosine"):
        compress(model, torch.randn(40, 8))


def test_one_glob_is_no_sequence_of_letters():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    problem = problem_from_model(model, torch.randn(20, 6), include="1*", exclude="11")
    assert [layer.name for layer in problem.layers] == ["1", "10"]


class Careless(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.mul_(1.5).sub_(1.0))


def test_a_model_that_changes_its_input_leaves_stored_inputs_alone():
    torch.manual_seed(0)
    inputs = torch.randn(80, 8)
    problem = problem_from_model(Careless(), inputs, held_out=inputs[:16])
    kept = [part.clone() for part in (problem.inputs, problem.calibration, problem.held_out)]
    problem.metrics(problem.teacher)
    problem.divergence(problem.teacher(problem.inputs), problem.teacher(problem.calibration))
    assert all(torch.equal(a, b) for a, b in
               zip(kept, (problem.inputs, problem.calibration, problem.held_out), strict=True))


def test_a_type_that_no_file_holds_is_told_before_the_search():
    model = nn.Sequential(nn.Linear(8, 4))
    model.register_buffer("turns", torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="turns has data type complex64: expected one of"):
        compress(model, torch.randn(40, 8))


def test_a_mask_of_minus_infinity_is_told_the_way_out():
    model = nn.Sequential(nn.Linear(8, 4))
    model.register_buffer("mask", torch.full((3, 3), -torch.inf))
    with pytest.raises(ValueError, match="teacher's mask holds .*persistent=False"):
        compress(model, torch.randn(40, 8))


class Talkative(nn.Module):
    """Returns more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict:
        return {"logits": self.layer(x), "aux": {"count": 3, "none": None, "mean": x.long().sum()}}


def test_numbers_and_none_in_an_output_are_passed_over_by_refit_too():
    assert compress(Talkative(), torch.randn(40, 8), augment="none").report["file_bytes"] > 0


def test_the_folder_of_another_run_is_refused_before_anything_in_it_changes(tmp_path):
    config = Config(problem=Config().problem, evolution=QUICK["evolution"], refit=QUICK["refit"],
                    quantization=QuantizationConfig(bits=4, refit_steps=5), pool=PoolConfig(kind="serial"))
    config.problem.teacher.epochs = 2
    config.tracking.enabled = False
    run_session(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    other = copy.deepcopy(config)
    other.quantization.bits = 2
    with pytest.raises(ValueError, match="holds another run, which has finished: quantization.bits=4 then, 2 now"):
        run_session(other, tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}


def test_two_tensors_of_one_name_are_refused_as_they_are_read():
    twice = write_entries("", [Entry("a", (1,), raw="int64")] * 2)
    with pytest.raises(DamagedFileError, match="two tensors have one name"):
        read_entries(twice)


def test_a_number_without_an_end_is_refused():
    with pytest.raises(DamagedFileError, match="more than 63 bits"):
        Reader(b"\x80" * 12).varint(2**40)
