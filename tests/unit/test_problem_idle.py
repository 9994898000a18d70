"""Layers that eval mode never reads: heads for training, and what only some inputs reach."""

import copy

import pytest
import torch
from torch import nn

import de_ray
from de_ray.problem.custom import problem_from_model
from tests.unit.test_odd_models import INPUTS, Layers, compress_quickly


class Auxiliary(Layers):
    """A second head that is there for training, as GoogLeNet has two."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, x):
        hidden = self.a(x).relu()
        return (self.b(hidden), self.aux(hidden)) if self.training else self.b(hidden)


class Late(Layers):
    """A layer that only the last input reaches."""

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(3, 3)

    def forward(self, x):
        found = super().forward(x)
        far = x[:, 0] > 5
        return torch.where(far[:, None], self.c(found), found) if far.any() else found


class Unwatched(Auxiliary):
    """The second head's first weight counts, past PyTorch's own operations."""

    def forward(self, x):
        return super().forward(x) * sum(map(sum, self.aux[0].weight.tolist()))


def test_a_head_for_training_takes_no_part_of_the_zeros_and_next_to_no_bytes(tmp_path, caplog):
    model = Auxiliary().eval()
    before = copy.deepcopy(model.state_dict())
    result = compress_quickly(model, sparsity=0.5)
    assert [layer["name"] for layer in result.report["layers"]] == ["a", "b"]
    assert result.report["sparsity"] >= 0.5
    assert "reads aux.0, aux.2, 87 % of the weights" in caplog.text
    assert "stay dense" not in caplog.text
    alone = compress_quickly(Layers(), sparsity=0.5)
    assert len(result.data) < len(alone.data) + 300  # names, shapes, and two biases of 67 numbers
    result.save(tmp_path / "student.der")
    student = de_ray.load(tmp_path / "student.der", model=copy.deepcopy(model))
    assert torch.equal(student(INPUTS), result.model(INPUTS))
    assert not student.aux[0].weight.any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_excluded_keeps_its_values_though_nothing_reads_it(caplog):
    model = Auxiliary()
    problem = problem_from_model(model, INPUTS, divergence="mse", exclude="aux.0")
    assert "reads aux.2, " in caplog.text
    assert torch.equal(problem.teacher.aux[0].weight, model.aux[0].weight)
    assert not problem.teacher.aux[2].weight.any()


def test_what_one_of_many_inputs_reaches_is_a_layer():
    inputs = INPUTS[:, :8].clone()
    assert [layer.name for layer in problem_from_model(Late(), inputs, divergence="mse").layers] == ["a", "b"]
    inputs[-1, 0] = 6.0
    found = problem_from_model(Late(), inputs, held_out=inputs, divergence="mse")
    assert [layer.name for layer in found.layers] == ["a", "b", "c"]


def test_what_is_read_in_ways_that_nobody_sees_is_a_layer(caplog):
    problem = problem_from_model(Unwatched(), INPUTS, divergence="mse")
    assert [layer.name for layer in problem.layers] == ["a", "b", "aux.0", "aux.2"]
    assert problem.teacher.aux[0].weight.any()
    assert "no pass in eval mode" not in caplog.text


@pytest.mark.parametrize("include", [["aux.*"], ["*"]])
def test_a_network_of_which_nothing_chosen_is_read_is_one_error(include):
    class Nothing(Auxiliary):
        def forward(self, x):
            return x if include == ["*"] else super().forward(x)

    with pytest.raises(ValueError, match="no gradient with respect to its layers' weights"):
        compress_quickly(Nothing(), include=include)
