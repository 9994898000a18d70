"""The whole pipeline on real digits and on a user's own network."""

import copy
import dataclasses
import gc
import json
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import de_ray
from de_ray import checkpoint, codec
from de_ray.config import (
    Config,
    EvolutionConfig,
    PoolConfig,
    ProblemConfig,
    QuantizationConfig,
    RefitConfig,
    TeacherConfig,
)
from de_ray.fingerprint import fingerprint
from de_ray.pipeline import run
from de_ray.problem.build import build_architecture, build_problem
from tests.networks import Branchy

KEYS = {"problem", "parameters", "sparsity", "layers", "file_bytes", "ratio", "divergence", "teacher", "student",
        "decoded_equals_student", "evaluations", "seconds", "seed", "versions"}


def small(**groups):
    """A configuration that takes seconds."""
    defaults = {"evolution": {"cycles": 4, "population": 6, "generations": 2, "saliency_inputs": 256},
                "refit": {"steps": 20, "final_steps": 60},
                "quantization": {"trials": 6, "refit_steps": 40, "max_bits": 4},
                "pool": {"kind": "serial"}}
    types = {"evolution": EvolutionConfig, "refit": RefitConfig, "quantization": QuantizationConfig, "pool": PoolConfig}
    return Config(**{name: types[name](**{**defaults[name], **groups.get(name, {})}) for name in types})


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits problem with a briefly trained teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DE_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        teacher = TeacherConfig(epochs=15, learning_rate=2e-3)
        yield build_problem(ProblemConfig(name="digits", calibration_size=512, teacher=teacher), 0)


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """What a run of the plain small configuration gives, and the folder that it has left its checkpoints in."""
    folder = tmp_path_factory.mktemp("plain")
    return run(digits, small(), folder), folder


@pytest.mark.parametrize("bits", [None, 3])
def test_a_target_of_size_is_met_and_used(digits, bits):
    config = dataclasses.replace(small(quantization={"bits": bits}), target_ratio=30.0)
    report = run(digits, config).report
    limit = int(4 * report["parameters"] / 30)
    assert report["target_bytes"] == limit
    assert 0.9 * limit <= report["file_bytes"] <= limit
    assert 0.5 < report["sparsity"] < 0.99


def test_a_target_that_no_file_meets_is_an_error_before_anything_starts(digits):
    with pytest.raises(ValueError, match=r"target_bytes=400 allows 400 bytes: expected more"):
        run(digits, dataclasses.replace(small(), target_bytes=400))


def test_bytes_that_weigh_in_fitness_make_a_smaller_file_of_the_same_sparsity(digits):
    quick = {"quantization": {"bits": 3, "refit_steps": 0}, "refit": {"method": "none"}}
    plain, weighed = (run(digits, small(evolution={"rate_weight": weight, "quota_sigma": 0.4}, **quick)).report
                      for weight in (0.0, 1.0))
    assert weighed["file_bytes"] < 0.97 * plain["file_bytes"]
    pruned = [1 - weighed["history"][-1]["sparsity"], 1 - plain["history"][-1]["sparsity"]]
    assert pruned[0] == pytest.approx(pruned[1], rel=1e-3)


def test_digits_keep_their_accuracy_at_ninety_percent_sparsity(digits, tmp_path):
    result = run(digits, small(refit={"steps": 60, "final_steps": 300}))
    report = json.loads(json.dumps(result.report))
    assert KEYS <= report.keys()
    assert {"name", "weights", "density", "bits", "bytes"} == report["layers"][0].keys()
    assert report["sparsity"] >= 0.9 and report["ratio"] > 25
    assert report["student"]["accuracy"] >= report["teacher"]["accuracy"] - 3
    path = result.save(tmp_path / "student.der")
    assert path.stat().st_size == report["file_bytes"]
    assert report["ratio"] == 4 * report["parameters"] / report["file_bytes"]
    loaded = de_ray.load(path, model=build_architecture("digits_mlp"))
    with torch.inference_mode():
        assert torch.equal(loaded(digits.held_out), result.model(digits.held_out))


def test_the_report_counts_the_zeros_that_are_in_the_file(plain):
    result, _ = plain
    weights = [value for name, value in result.model.state_dict().items() if name.endswith("weight")]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert result.report["sparsity"] == pytest.approx(zeros / sum(w.numel() for w in weights))
    lines = {line.name: line for line in codec.inspect(result.data).tensors}
    for weight, layer in zip(weights, result.report["layers"], strict=True):
        assert layer["density"] == pytest.approx(float((weight != 0).float().mean()))
        assert lines[f"{layer['name']}.weight"].levels <= 2 ** layer["bits"]


@pytest.fixture
def in_sight():
    """The garbage collector sees all objects, as in a user's process."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_was_garbage_before_a_run_is_freed_by_it_and_no_object_stays_out_of_sight(digits, in_sight):
    network = nn.Linear(1, 1)
    network.itself = network
    left = weakref.ref(network)
    gc.collect()  # now old, so that only a look at all objects finds out that nobody wants it
    del network
    run(digits, small(evolution={"cycles": 1, "generations": 0}, refit={"steps": 0, "final_steps": 0},
                      quantization={"bits": 4, "refit_steps": 0}))
    assert left() is None
    assert gc.get_freeze_count() == 0, "garbage among them would pile up from run to run"


def test_what_an_application_keeps_from_the_garbage_collector_stays_kept(digits):
    kept = gc.get_freeze_count()
    run(digits, small(evolution={"cycles": 1, "generations": 0}, refit={"steps": 0, "final_steps": 0},
                      quantization={"bits": 4, "refit_steps": 0}))
    assert 0 < gc.get_freeze_count() <= kept, "but for what nobody refers to any more"


def test_one_seed_gives_one_file_and_another_seed_another(digits, plain):
    first = plain[0].data
    assert run(digits, small()).data == first
    assert run(digits, dataclasses.replace(small(), seed=1)).data != first


def test_labels_do_not_reach_the_file(digits, plain):
    blind = dataclasses.replace(digits, metrics=lambda model: {})
    assert run(blind, small()).data == plain[0].data


@pytest.mark.parametrize("method", ["magnitude", "wanda", "fisher", "obs", "uniform"])
def test_a_baseline_evaluates_no_candidate_sets(digits, method):
    result = run(digits, small(evolution={"criteria": [method], "generations": 0}, quantization={"bits": 4}))
    assert result.report["sparsity"] >= 0.9
    # Looks at the student before and after each refit, one for the last, and five for the table and the widths' choice.
    assert result.report["evaluations"] <= 2 * 4 + 1 + 5


def test_without_a_refit_the_gradient_finds_zeros_that_set_off_each_other(digits):
    search = {"cycles": 20, "population": 12, "generations": 3, "saliency_inputs": 1024, "schedule": "cubic"}
    plain, ours = (run(digits, small(evolution={**search, "criteria": criteria}, refit={"method": "none"},
                                     quantization={"bits": 8, "refit_steps": 0}))
                   for criteria in (["fisher", "magnitude"], None))
    assert ours.report["divergence"]["held_out"] < 0.85 * plain.report["divergence"]["held_out"]


def test_directed_evolution_starts_no_worse_than_its_criteria(digits):
    result = run(digits, small(evolution={"cycles": 1}, refit={"steps": 0, "final_steps": 0}))
    plain = [run(digits, small(evolution={"cycles": 1, "criteria": [c], "generations": 0},
                               refit={"steps": 0, "final_steps": 0}))
             for c in ("fisher", "magnitude")]
    assert result.report["history"][0]["divergence"] <= min(p.report["history"][0]["divergence"] for p in plain)


class Killed(Exception):
    """Stands for whatever ends a run."""


ADAPTIVE = {"schedule": "adaptive"}


@pytest.fixture(scope="module")
def whole(digits):
    """The file of a run that nothing ended."""
    return run(digits, small(evolution=ADAPTIVE)).data


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_that_was_ended_continues_to_the_same_file(digits, whole, tmp_path, at):
    config = small(evolution=ADAPTIVE)

    def end(record, total):
        if record.cycle == at:
            raise Killed

    with pytest.raises(Killed):
        run(digits, config, tmp_path, end)
    seen = []
    continued = run(digits, config, tmp_path, lambda record, total: seen.append(record.cycle))
    assert continued.data == whole
    assert seen[:1] in ([at + 1], [])
    assert len(continued.report["history"]) == 5


def test_a_checkpoint_of_another_configuration_is_refused_by_the_key_that_differs(digits, plain):
    _, folder = plain
    assert checkpoint.latest(folder).done == 5
    other = small(evolution={"sparsity": 0.8})
    with pytest.raises(ValueError, match=r"evolution\.sparsity=0\.9 then, 0\.8 now"):
        run(digits, other, folder)


def test_a_checkpoint_of_a_network_of_other_steps_and_the_same_weights_is_refused(digits):
    other = dataclasses.replace(digits, teacher=nn.Sequential(copy.deepcopy(digits.teacher), nn.Identity()))
    assert fingerprint(digits, small()) == fingerprint(digits, small()) != fingerprint(other, small())


def test_a_checkpoint_of_a_calibration_file_that_was_replaced_is_refused(digits):
    config = dataclasses.replace(small(), problem=ProblemConfig(name="custom", model="a:b", calibration="c.npy"))
    assert fingerprint(digits, config) != fingerprint(dataclasses.replace(digits, inputs=digits.inputs + 1), config)


def test_least_squares_refit_runs_through_the_pipeline(digits):
    result = run(digits, small(evolution={"sparsity": 0.5}, refit={"method": "least_squares"}))
    assert result.report["student"]["accuracy"] > 80


def test_narrow_layers_lose_less_with_error_feedback_and_wider_ones_have_none(digits):
    def divergence(bits, widest):
        quantization = {"bits": bits, "refit_steps": 0, "feedback_bits": widest}
        # Half of the weights survive: the more there are, the better they make up for each other.
        student = {"evolution": {"sparsity": 0.5, "cycles": 4, "generations": 1, "saliency_inputs": 256}}
        return run(digits, small(**student, quantization=quantization)).report["divergence"]["calibration"]

    assert divergence(2, widest=2) < 0.6 * divergence(2, widest=0)
    assert divergence(3, widest=2) == divergence(3, widest=0)


def test_any_model_goes_through_the_python_api(tmp_path):
    torch.manual_seed(0)
    model, inputs = Branchy(), torch.randn(160, 3, 9, 9)
    result = de_ray.compress(model, inputs, sparsity=0.5, bits=3, divergence="mse", exclude=["scale"],
                             evolution=EvolutionConfig(cycles=2, population=4, generations=1, elite=1, tournament=2),
                             refit=RefitConfig(steps=10, final_steps=20),
                             quantization=QuantizationConfig(refit_steps=10))
    path = result.save(tmp_path / "own.der")
    fresh = de_ray.load(path, model=Branchy())
    assert not fresh.training
    with torch.inference_mode():
        ours, theirs = result.model(inputs), fresh(inputs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [layer["name"] for layer in result.report["layers"]] == ["stem", "grouped", "down", "head"]
    assert set(de_ray.load(path)) == set(model.state_dict())


class Outputs(nn.Module):
    """Returns its output in a container of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> object:
        y = self.fc(x)
        return {"tensor": y, "tuple": (y, y * 2), "list": [y, [y]], "dict": {"a": y, "b": (y,)}}[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
def test_models_may_return_tensors_tuples_lists_and_dicts(kind):
    torch.manual_seed(0)
    result = de_ray.compress(Outputs(kind), np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32),
                             sparsity=0.25, divergence="mse", evolution=EvolutionConfig(cycles=1),
                             refit=RefitConfig(steps=5, final_steps=5),
                             quantization=QuantizationConfig(refit_steps=5))
    assert result.report["sparsity"] >= 0.25


def test_sparsity_zero_still_quantizes_and_codes(digits):
    result = run(digits, small(evolution={"sparsity": 0.0, "cycles": 1}, quantization={"bits": 4}))
    assert result.report["sparsity"] < 0.6 and result.report["ratio"] > 6


@pytest.mark.parametrize(("arguments", "message"), [
    ({"sparsity": 1.0}, r"evolution\.sparsity=1\.0.*\[0, 1\)"), ({"bits": 9}, r"quantization\.bits=9.*1\.\.8"),
    ({"include": ["conv*"]}, r"conv\*"), ({"divergence": "l2"}, r"divergence='l2'.*kl, mse, cosine"),
    ({"augment": "rotate"}, r"augment='rotate'.*none, shift, cutmix"), ({"augment": "shift"}, r"expected images"),
])
def test_bad_arguments_fail_at_once_and_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        de_ray.compress(nn.Sequential(nn.Linear(6, 4)), torch.randn(60, 6), **arguments)
