"""What a student's file takes, before there is one."""

import numpy as np
import pytest
import torch
from torch import nn

from de_ray import codec
from de_ray.codec import QuantizedTensor
from de_ray.config import EvolutionConfig, QuantizationConfig
from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.rate import RateModel, binary_entropy
from de_ray.evolution.schedule import Targets
from de_ray.problem.layers import find_layers
from de_ray.quantization.choose import choose
from de_ray.quantization.sensitivity import choices_at
from de_ray.rate import aimed_sparsity, measure_rate, require_room
from de_ray.student import Student
from tests.networks import mlp_problem


@pytest.fixture
def model():
    prices = (np.full(1000, 4.0, np.float32), np.full(100, 3.0, np.float32))
    return RateModel(np.array([1000, 100]), np.array([200, 50]), np.array([0.9, 1.0]), np.array([2.0, 3.0]), prices)


@pytest.fixture
def student():
    """Two layers of which a tenth and a half survive, one of three quarters, one with nothing."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(200, 150), nn.Linear(150, 100), nn.Linear(100, 10), nn.Linear(10, 10))
    student = Student(module, find_layers(module))
    rng = np.random.default_rng(0)
    student.commit(tuple(
        ZeroingSet(l, np.sort(rng.choice(layer.size, round(share * layer.size), replace=False)))
        for l, (layer, share) in enumerate(zip(student.layers, (0.9, 0.5, 0.25, 1.0), strict=True))))
    return student


def test_entropy_is_one_bit_at_a_half_and_nothing_at_the_ends():
    assert binary_entropy([0.0, 0.5, 1.0]) == pytest.approx([0.0, 1.0, 0.0])
    assert binary_entropy([0.1]) == pytest.approx(binary_entropy([0.9]))


def test_a_candidate_is_priced_by_what_it_zeroes_and_brings_back(model):
    candidate = (ZeroingSet(0, np.arange(30), np.arange(500, 510)), ZeroingSet(1, np.arange(5)))
    whole = model.bits(model.survivors)
    assert model.after(candidate) == pytest.approx(whole - 20 * 4.0 - 5 * 3.0)
    assert model.after(()) == whole


@pytest.mark.parametrize("free", [[True, True], [True, False]])
def test_the_share_that_may_stay_uses_up_the_bits(model, free):
    share = model.share_for(600.0, np.array(free))
    assert 0 < share < 1
    assert model.bits(np.where(free, share * model.survivors, model.survivors)) == pytest.approx(600.0)
    assert model.share_for(1e9, np.array(free)) == 1.0


def test_the_model_tells_what_the_coder_spends_on_the_student(student):
    config = QuantizationConfig(bits=3)
    weights = [weight.numpy() for weight in student.weights]
    tensors = [choose(l, w, 3, config).to_tensor(f"{l}", w) for l, w in enumerate(weights)]
    spent = 8 * sum(codec.coded_bytes(tensor) for tensor in tensors)
    model = measure_rate(student, QuantizationConfig(bits=3, row_scales="never"))
    assert model.bits(model.survivors) == pytest.approx(spent, rel=0.02)
    assert model.survivors.tolist() == [int(mask.sum()) for mask in student.masks]


def test_the_aim_is_sparser_for_fewer_bytes_and_stays_below_one(student):
    model = measure_rate(student, QuantizationConfig())
    free = np.ones(4, bool)
    aims = [aimed_sparsity(model, limit, free) for limit in (1e-3, 1000.0, 2000.0, 1e9)]
    assert 1 > aims[0] > aims[1] > aims[2] > aims[3]
    assert aims[3] == pytest.approx(student.sparsity)


def test_layers_that_will_have_gone_take_no_room_from_those_that_follow_the_aim(student):
    model, free = measure_rate(student, QuantizationConfig()), np.array([True, False, True, True])
    ends = np.array([0, 50, 0, 0])  # of 7,500 survivors of the second layer
    now, then = (aimed_sparsity(model, 2000.0, free, given) for given in (None, ends))
    assert then < now
    kept = (1 - then) * sum(layer.size for layer, follows in zip(student.layers, free, strict=True) if follows)
    share = kept / model.survivors[free].sum()
    assert model.bits(np.where(free, share * model.survivors, ends)) == pytest.approx(8 * 2000.0, rel=0.01)


def test_targets_that_leave_no_room_are_told(student):
    model = measure_rate(student, QuantizationConfig())
    targets = Targets(EvolutionConfig(targets={"1": 0.5}), student.layers)
    require_room(model, 1e6, targets)
    with pytest.raises(ValueError, match="evolution.targets: .* take about .*leaves 1,000 for all layers"):
        require_room(model, 1000.0, targets)


def test_prices_tell_what_zeroing_saves_in_the_coder(student):
    """Zero a twentieth of the survivors here and there: the file shrinks by about the sum of their prices."""
    config, rng = QuantizationConfig(bits=3, row_scales="never"), np.random.default_rng(1)
    model = measure_rate(student, config)
    choices, _ = choices_at([w.numpy() for w in student.weights[:2]], config)
    for layer in (0, 1):
        symbols = choices[layer][0].symbols(student.weights[layer].numpy())
        zeroed = rng.choice(np.flatnonzero(symbols), np.count_nonzero(symbols) // 20, replace=False)
        fewer = symbols.copy()
        fewer.reshape(-1)[zeroed] = 0
        before, after = (codec.coded_bytes(QuantizedTensor("", s, levels=choices[layer][0].levels))
                         for s in (symbols, fewer))
        assert 8 * (before - after) == pytest.approx(float(model.prices[layer][zeroed].sum()), rel=0.25)


def test_a_survivor_among_zeros_costs_more_than_one_among_survivors():
    symbols = np.zeros((40, 50), np.int32)
    symbols[:, :5] = 1  # five whole columns
    symbols[20, 30] = 1  # and one weight apart
    p = codec.significance(symbols)
    assert p.shape == symbols.shape and (0 < p).all() and (p < 1).all()
    assert p[20, 30] < p[20:, :5].min()


def test_level_tables_are_no_cost_of_places():
    problem = mlp_problem()
    student = Student(problem.teacher, problem.layers)
    for mask, weight in zip(student.masks, student.weights, strict=True):
        mask.view(-1)[::16] = False
        weight.data.mul_(mask)
    assert (measure_rate(student, QuantizationConfig(bits=4), priced=False).gains < 4).all()
