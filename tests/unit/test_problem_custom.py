import copy
import io
import re
import sys
import textwrap
from math import inf, nan

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import de_ray
from de_ray import checkpoint, codec
from de_ray.config import (
    EvolutionConfig,
    ProblemConfig,
    QuantizationConfig,
    RefitConfig,
    TeacherConfig,
)
from de_ray.problem.build import build_problem
from de_ray.problem.custom import import_model, problem_from_model
from de_ray.problem.measure import mean_divergence
from de_ray.problem.probing import differ

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(50, 6)).astype(np.float32)

SOURCE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.body(x)).relu())

    instance = Net()
    number = 3
    def wrong(): return "a string"
    def fails(): raise KeyError("weights")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that holds a user's module and inputs."""
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "nets.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "users" / "broken.py").write_text("1 / 0")
    (tmp_path / "users" / "needy.py").write_text("import no_such_package")
    np.save(tmp_path / "inputs.npy", INPUTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "users"]:
        del sys.modules[name]


def config(**fields) -> ProblemConfig:
    return ProblemConfig(**{"name": "custom", "model": "users.nets:Net", "calibration": "inputs.npy", **fields})


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_problem_has_the_name_that_it_is_given():
    assert problem_from_model(net(), INPUTS, name="mine").name == "mine"
    assert problem_from_model(net(), INPUTS).name == "custom"


def test_a_model_by_import_path_becomes_a_problem(folder):
    problem = build_problem(config(exclude=["head"]), seed=0)
    assert [layer.name for layer in problem.layers] == ["body"]
    assert problem.architecture == "users.nets:Net"
    assert not problem.teacher.training
    assert problem.teacher.norm.running_mean.eq(0).all()
    assert problem.inputs.equal(torch.from_numpy(INPUTS[:40]))
    assert problem.held_out.equal(torch.from_numpy(INPUTS[40:]))
    assert {tuple(row) for row in problem.calibration.tolist()} == {tuple(row) for row in problem.inputs.tolist()}
    assert problem.divergence(problem.teacher(problem.held_out), problem.teacher(problem.held_out)).eq(0).all()
    assert problem.metrics(problem.teacher) == {"agreement": 1.0}


def test_a_model_that_is_a_layer_itself_compresses():
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 6)
    result = de_ray.compress(model, torch.randn(64, 12), sparsity=0.5, divergence="mse",
                             evolution=EvolutionConfig(cycles=2, population=4, generations=1),
                             refit=RefitConfig(steps=5, final_steps=5),
                             quantization=QuantizationConfig(refit_steps=5))
    assert [layer["name"] for layer in result.report["layers"]] == [""]
    assert result.report["sparsity"] >= 0.5 and result.model.weight.eq(0).sum() >= 36


def test_a_model_may_be_given_as_an_object(folder):
    assert import_model("users.nets:instance") is sys.modules["users.nets"].instance


@pytest.mark.parametrize(("path", "message"), [
    ("users.nets", "expected package.module:build"),
    (":Net", "expected package.module:build"),
    ("users.absent:Net", "no module named 'users.absent'"),
    ("users.needy:Net", "no module named 'no_such_package'"),
    ("users.broken:Net", "importing users.broken failed: ZeroDivisionError"),
    ("users.nets:Absent", "no attribute 'Absent'"),
    ("users.nets:number", "a callable, but it is a int"),
    ("users.nets:wrong", "it returned a str"),
    ("users.nets:fails", "calling it failed: KeyError"),
])
def test_a_model_that_cannot_be_imported_is_a_value_error(folder, path, message):
    with pytest.raises(ValueError, match=message):
        build_problem(config(model=path), seed=0)


def test_a_checkpoint_is_loaded_into_the_model(folder):
    state = {name: torch.full_like(value, 0.5) for name, value in import_model("users.nets:Net").state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    problem = build_problem(config(teacher=TeacherConfig(checkpoint="weights.safetensors")), seed=0)
    assert problem.teacher.head.weight.eq(0.5).all()


@pytest.mark.parametrize("key", ["calibration", "held_out"])
def test_missing_and_foreign_input_files_are_named(folder, key):
    with pytest.raises(FileNotFoundError, match=f"problem.{key}='absent.npy'"):
        build_problem(config(**{key: "absent.npy"}), seed=0)
    np.save("objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez("objects.npz", x=INPUTS, y=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez("whole.npz", INPUTS)
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:-100])
    np.savez("empty.npz")
    (folder / "text.npy").write_text("1 2 3")
    for name in ("objects.npy", "objects.npz", "cut.npz", "empty.npz", "text.npy"):
        with pytest.raises(ValueError, match=f"problem.{key}='{name}'"):
            build_problem(config(**{key: name}), seed=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.uint8, np.bool_])
def test_inputs_become_float32_with_their_values_kept(dtype):
    array = RNG.integers(0, 2, (10, 6)).astype(dtype)
    problem = problem_from_model(net(), array)
    assert problem.inputs.dtype == torch.float32
    assert problem.inputs.equal(torch.from_numpy(array[:8].astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_whole_numbers_stay_indices_for_embeddings(dtype):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    problem = problem_from_model(model, RNG.integers(0, 9, (10, 3)).astype(dtype))
    assert problem.inputs.dtype == torch.int64
    assert [layer.name for layer in problem.layers] == ["2"]


def test_tensors_are_inputs_too():
    inputs = torch.from_numpy(INPUTS).bfloat16()
    assert problem_from_model(net(), inputs).inputs.equal(inputs[:40].float())


@pytest.mark.parametrize(("array", "message"), [
    (np.where(np.arange(50)[:, None] == 7, np.nan, INPUTS), "in 1 of 50 samples; the first is sample 7"),
    (INPUTS.astype(np.float64) * 1e300, "beyond float32"),
    (INPUTS.astype(np.complex64), "complex64"),
    (torch.from_numpy(INPUTS).to_sparse(), "sparse_coo: expected a dense tensor"),
    (np.array(["a", "b"]), "expected floating-point or whole numbers"),
    (INPUTS[:0], "at least one sample"),
    (np.zeros(()), "at least one sample"),
    (INPUTS[:1], "two or more samples"),
    ([[1.0] * 6] * 10, "calibration='list': expected one array or tensor"),
    (INPUTS[:, :5], r"does not accept calibration inputs \[8, 5\] of torch.float32"),
    (np.ones((10, 6), np.int64), r"does not accept calibration inputs \[8, 6\] of torch.int64"),
])
def test_inputs_that_do_not_fit_are_a_value_error(array, message):
    with pytest.raises(ValueError, match=message):
        problem_from_model(net(), array)


def test_held_out_inputs_must_look_like_calibration_inputs():
    with pytest.raises(ValueError, match=r"held_out has samples torch.float32 \[5\]"):
        problem_from_model(net(), INPUTS, held_out=INPUTS[:, :5])
    problem = problem_from_model(net(), INPUTS[:30], held_out=INPUTS[30:])
    assert (len(problem.inputs), len(problem.held_out)) == (30, 20)


def test_the_model_that_is_given_stays_as_it_was():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    model[1].running_mean += 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    problem = problem_from_model(model, INPUTS)
    assert model.training
    assert all(value.requires_grad for value in model.parameters())
    assert all(value.dtype == before[name].dtype and value.equal(before[name])
               for name, value in model.state_dict().items())
    assert problem.teacher[0].weight.dtype == torch.float32


def test_the_seed_decides_which_inputs_are_for_calibration():
    draws = [problem_from_model(net(), INPUTS, calibration_size=10, seed=seed).calibration for seed in (0, 0, 1)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_that_is_not_finite_is_named(value):
    model = net()
    model[2].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"2\.weight holds NaN"):
        problem_from_model(model, INPUTS)


class Returns(nn.Module):
    """A linear layer whose output passes through a function."""

    def __init__(self, change):
        super().__init__()
        self.fc, self.change = nn.Linear(6, 4), change

    def forward(self, x):
        return self.change(self.fc(x))


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x.sum(), r"into \[\]: expected 8 samples in front"),
    (lambda x: x.T, r"into \[4, 8\]: expected 8 samples in front"),
    (lambda x: x / 0 * 0, "output for calibration .* NaN"),
    (lambda x: x.argmax(1), "no floating-point tensor"),
    (lambda x: {"a": object()}, "is a object"),
    (lambda x: x[:, 0], "use mse or cosine"),
])
def test_outputs_that_have_no_divergence_are_a_value_error(change, message):
    with pytest.raises(ValueError, match=message):
        problem_from_model(Returns(change), INPUTS)


@pytest.mark.parametrize("divergence", ["kl", "mse", "cosine"])
@pytest.mark.parametrize("change", [
    lambda x: x, lambda x: (x, 2 * x), lambda x: [x, x.unflatten(1, (2, 2))], lambda x: {"a": x, "b": [x.exp(), None]},
], ids=["tensor", "tuple", "list", "dict"])
def test_metrics_of_any_output_tell_the_teacher_from_a_student(divergence, change):
    problem = problem_from_model(Returns(change), INPUTS, divergence=divergence)
    student = Returns(change)
    student.fc.weight.data, student.fc.bias.data = -problem.teacher.fc.weight, -problem.teacher.fc.bias
    same, other = problem.metrics(problem.teacher), problem.metrics(student)
    if divergence == "kl":
        assert same == {"agreement": 1.0}
        assert other["agreement"] < 0.5
    else:
        assert same == {"relative_error": 0.0}
        assert other["relative_error"] > 0.5


def test_relative_error_of_a_negated_output_is_two():
    problem = problem_from_model(Returns(lambda x: x), INPUTS, divergence="mse")
    student = Returns(lambda x: -x)
    student.load_state_dict(problem.teacher.state_dict())
    assert problem.metrics(student)["relative_error"] == pytest.approx(2)


def test_batch_norm_stays_where_folding_would_change_the_output(caplog):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
            nn.init.constant_(self.norm.running_var, 3.0)

        def forward(self, x):
            return self.norm(self.fc(x)) * self.norm.running_var

    model = Reads()
    problem = problem_from_model(model, INPUTS)
    assert "not folded" in caplog.text
    assert problem.teacher.norm.running_var.eq(3).all()


def test_a_user_is_told_of_parameters_that_no_layer_holds(caplog):
    words = nn.Sequential(nn.Embedding(100, 6), nn.Flatten(), nn.Linear(24, 3))
    problem_from_model(words, torch.randint(100, (10, 4)))
    assert "parameters stay dense" in caplog.text and "0.weight" in caplog.text
    caplog.clear()
    norm = nn.utils.parametrizations.weight_norm
    problem_from_model(nn.Sequential(norm(nn.Linear(6, 9)), norm(nn.Linear(9, 9)), nn.Linear(9, 3)), INPUTS)
    assert "the weight of 0, ... is computed from other parameters" in caplog.text
    caplog.clear()
    problem_from_model(nn.Linear(6, 3), INPUTS)
    assert not caplog.text


def test_something_else_than_a_module_is_a_value_error():
    with pytest.raises(ValueError, match="model='function': expected a torch.nn.Module"):
        problem_from_model(lambda x: x, INPUTS)


@pytest.mark.parametrize(("dtype", "told"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_a_model_of_16_bits_is_told_what_ratios_are_over(dtype, told, caplog):
    problem_from_model(nn.Sequential(nn.Linear(6, 3)).to(dtype), torch.randn(20, 6))
    assert ("ratios are over that size" in caplog.text) == told


def test_an_augmentation_that_does_not_exist_is_refused_rather_than_taken_for_another():
    with pytest.raises(ValueError, match=r"problem\.augment='detection': expected one of none, shift"):
        problem_from_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.randn(20, 3, 4, 4), augment="detection")


class Consistent(nn.Module):
    """Takes inputs whose columns agree, as they do in each sample, and not in two that are spliced."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.last = answer, nn.Linear(8, 3)

    def forward(self, x):
        if bool((x != x[:, :1]).any()):
            if self.answer == "error":
                raise ValueError("columns differ")
            return self.last(x) * torch.nan
        return self.last(x)


@pytest.mark.parametrize("answer", ["error", "nan"])
def test_a_model_that_does_not_take_spliced_inputs_has_them_as_they_are(answer, caplog):
    inputs = torch.randn(20, 1).expand(20, 8)
    problem = problem_from_model(Consistent(answer), inputs, divergence="mse", augment="auto")
    assert problem.augment is None and "composed of each other" in caplog.text
    assert (problem.calibration == problem.calibration[:, :1]).all()
    with pytest.raises(ValueError, match="does not accept calibration|holds NaN"):
        problem_from_model(Consistent(answer), inputs, divergence="mse", augment="cutmix")


def test_inputs_that_are_no_images_are_spliced_by_default(caplog):
    found = problem_from_model(nn.Linear(8, 3), torch.randn(20, 8), divergence="mse", augment="auto")
    assert found.augment is not None and not caplog.text


def test_large_outputs_are_kept_of_fewer_inputs_and_measured_in_smaller_passes(monkeypatch):
    monkeypatch.setattr("de_ray.problem.custom.OUTPUT_NUMBERS", 30)
    monkeypatch.setattr("de_ray.problem.measure.PASS_NUMBERS", 14)
    network = nn.Linear(2, 3)
    problem = problem_from_model(network, torch.randn(20, 2), held_out=torch.randn(9, 2), divergence="mse")
    assert len(problem.inputs) == 20 and len(problem.calibration) == 30 // 3
    sizes, student = [], copy.deepcopy(problem.teacher)
    student.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    assert mean_divergence(problem, student, problem.held_out) == 0
    assert problem.metrics(student) == {"relative_error": 0}
    assert sizes == [1, 4, 4, 1, 4, 4, 1], "3 numbers an output, 4 of them a pass, after a look at one"


QUICK = {"evolution": EvolutionConfig(cycles=2, population=4, generations=1),
         "refit": RefitConfig(steps=5, final_steps=5), "quantization": QuantizationConfig(refit_steps=5)}


def compress_quickly(model, inputs, **arguments):
    return de_ray.compress(model, inputs, **{**QUICK, "sparsity": 0.5, **arguments})


@pytest.mark.parametrize("model", [nn.Linear(8, 1), nn.Sequential(nn.Linear(8, 4), nn.Unflatten(1, (1, 4)))])
def test_kl_of_a_single_class_is_refused_since_any_outputs_would_be_equal(model):
    with pytest.raises(ValueError, match=r"C >= 2 classes, got \[8, 1.*use mse or cosine"):
        compress_quickly(model, torch.randn(40, 8))


def test_a_group_says_what_a_keyword_leaves_at_its_default_and_both_cannot_differ():
    model, inputs = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(40, 8)
    groups = {"evolution": EvolutionConfig(sparsity=0.25, cycles=1, population=4, generations=0), "bits": 3,
              "quantization": QuantizationConfig(refit_steps=1, rate_weight=0)}
    report = de_ray.compress(model, inputs, **groups, refit=QUICK["refit"]).report
    assert report["sparsity"] < 0.5 and [layer["bits"] for layer in report["layers"]] == [3, 3]
    with pytest.raises(ValueError, match=r"sparsity=0\.5: expected nothing beside evolution, whose sparsity is 0\.25"):
        de_ray.compress(model, inputs, sparsity=0.5, **groups)


def test_modes_of_the_caller_do_no_harm_or_are_told_at_once():
    model, inputs = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(40, 8)
    expected = compress_quickly(model, inputs).data
    with torch.no_grad():
        assert compress_quickly(model, inputs).data == expected
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode=True: expected False"):
        compress_quickly(model, inputs)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"get_default_dtype\(\)=torch\.float64: expected torch\.float32"):
            compress_quickly(model, inputs)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("change", "message"), [
    (torch.jit.script, "RecursiveScriptModule.*TorchScript"), (nn.utils.weight_norm, "Linear.*remove_weight_norm")])
def test_modules_that_cannot_be_taken_apart_or_copied_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        compress_quickly(change(nn.Linear(8, 4)), torch.randn(40, 8))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(14)
        self.c, self.scale = nn.Conv2d(14, 5, 6), nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.scale * self.c(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()).flatten(1)


@pytest.mark.parametrize("model", [Concatenated(), nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 5))])
def test_batch_norm_of_several_layers_units_and_single_numbers_reach_the_file(model):
    result = compress_quickly(model.eval(), torch.randn(60, 1, 8, 8), sparsity=0.97)
    state = codec.decode(result.data)
    assert all(torch.equal(value, state[name]) for name, value in result.model.state_dict().items())


def test_a_teacher_that_draws_numbers_or_is_wrapped_is_told():
    class Drawing(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5)

    with pytest.raises(ValueError, match="differ from pass to pass"):
        compress_quickly(Drawing(8, 4), torch.randn(40, 8))
    with pytest.raises(ValueError, match=r"model='DataParallel': expected the module within"):
        compress_quickly(nn.DataParallel(nn.Linear(8, 4)), torch.randn(40, 8))


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
        compress_quickly(model, torch.randn(40, 8))


class Talkative(nn.Module):
    """Returns more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict:
        return {"logits": self.layer(x), "aux": {"count": 3, "none": None, "mean": x.long().sum()}}


class Anchored(nn.Module):
    """Returns what is the same for all samples beside what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x), torch.arange(3)


def test_outputs_that_no_sample_has_of_its_own_are_passed_over_by_refit_too():
    assert compress_quickly(Anchored(), torch.randn(300, 8), augment="none").report["file_bytes"] > 0


def test_numbers_and_none_in_an_output_are_passed_over_by_refit_too():
    assert compress_quickly(Talkative(), torch.randn(40, 8), augment="none").report["file_bytes"] > 0


class Counting(nn.Module):
    """Counts its own passes in a buffer that it stores."""

    def __init__(self, dtype: torch.dtype = torch.int64) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("passes", torch.zeros((), dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.layer(x)


def test_the_model_of_the_result_is_what_the_file_holds_even_if_it_counts_its_passes():
    result = compress_quickly(Counting(), torch.randn(40, 8))
    held = codec.decode(result.data)
    assert all(torch.equal(value, held[name]) for name, value in result.model.state_dict().items())


class Remembering(nn.Module):
    """Keeps its last inputs, as many as there were, in a buffer that it does not store."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("last", torch.zeros(1, 8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x.detach()
        return self.layer(x)


def test_a_buffer_that_is_not_stored_may_change_its_shape():
    assert codec.decode(compress_quickly(Remembering(), torch.randn(40, 8)).data).keys() == {"layer.weight",
                                                                                             "layer.bias"}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_passes_of_the_compressor_are_none_of_the_networks(dtype, tmp_path, monkeypatch):
    """A run that was interrupted makes other passes, and has the same file."""
    model, inputs, save = Counting(dtype), torch.randn(40, 8), checkpoint.save_checkpoint
    expected = compress_quickly(model, inputs)

    def interrupt(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress_quickly(model, inputs, folder=tmp_path)
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert compress_quickly(model, inputs, folder=tmp_path).data == expected.data
    assert codec.decode(expected.data)["passes"] < 20, "those in which the network was looked at"


@pytest.mark.parametrize("group", ["evolution", "refit", "quantization", "pool"])
def test_a_group_that_is_none_is_told_at_once(group):
    kind = f"{group.capitalize()}Config"
    with pytest.raises(ValueError, match=rf"{group}={{'bits': 3}}: expected a de_ray.config.{kind}, or None"):
        de_ray.compress(nn.Linear(8, 4), torch.randn(40, 8), **{group: {"bits": 3}})


def test_a_seed_of_numpy_is_a_number_and_globs_are_texts():
    model, inputs = nn.Linear(8, 4), torch.randn(40, 8)
    assert compress_quickly(model, inputs, seed=np.int64(3)).data == compress_quickly(model, inputs, seed=3).data
    for key, globs in (("include", None), ("exclude", [3]), ("exclude", None)):
        with pytest.raises(ValueError, match=f"{key}=.*: expected a glob of layer names, or a list"):
            compress_quickly(model, inputs, **{key: globs})


SHORT = {"evolution": EvolutionConfig(cycles=3, population=4), "refit": RefitConfig(steps=3, final_steps=3, batch=16),
         "quantization": QuantizationConfig(refit_steps=2)}


def test_an_interrupted_compression_is_continued_from_its_folder_to_the_same_file(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    expected = de_ray.compress(model, INPUTS, **SHORT).data
    save, evaluations = checkpoint.save_checkpoint, []

    def interrupt(folder, done, tensors, meta):
        path = save(folder, done, tensors, meta)
        evaluations.append(meta["history"][-1]["evaluations"])
        if len(evaluations) == 2:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        de_ray.compress(model, INPUTS, folder=tmp_path / "new" / "run", **SHORT)
    result = de_ray.compress(model, INPUTS, folder=str(tmp_path / "new" / "run"), **SHORT)
    assert result.data == expected and len(evaluations) == 4, "two records before, two after"


@pytest.mark.parametrize(("inputs", "arguments", "named"), [
    (INPUTS[::-1].copy(), {}, "teacher_digest"), (INPUTS, {"divergence": "mse"}, "problem.divergence='kl' then, 'mse'"),
    (INPUTS, {"exclude": "2"}, "problem.exclude"), (INPUTS, {"seed": 1}, "seed=0 then, 1 now"),
    (INPUTS, {"sparsity": 0.5}, "evolution.sparsity=0.9 then, 0.5 now")])
def test_the_folder_of_another_compression_is_refused(tmp_path, inputs, arguments, named):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    de_ray.compress(model, INPUTS, folder=tmp_path, **SHORT)
    with pytest.raises(ValueError, match=f"the checkpoint is another run's: .*{re.escape(named)}"):
        de_ray.compress(model, inputs, folder=tmp_path, **SHORT, **arguments)


def test_a_folder_that_cannot_be_one_or_cannot_be_written_is_told_before_the_search(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        de_ray.compress(model, INPUTS, folder=tmp_path / "file", **SHORT)
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="folder='.*': expected a folder that can be written"):
        de_ray.compress(model, INPUTS, folder=tmp_path, **SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_terminal_shows_cycles_and_the_time_left_unless_asked_not_to(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    monkeypatch.setattr("de_ray.progress.Console",
                        lambda stderr: Console(file=drawn, force_terminal=True, width=120))
    drawn = io.StringIO()
    de_ray.compress(model, INPUTS, progress=False, **SHORT)
    assert drawn.getvalue() == ""
    de_ray.compress(model, INPUTS, **SHORT)
    shown = drawn.getvalue()
    assert "sparsity 90.00%" in shown and " left" in shown and all(stage in shown for stage in ("evolve", "quantize"))


@pytest.mark.parametrize(("one", "other", "expected"), [
    ([1.0, 2.0], [1.0, 2.0], False),
    ([1.0, 2.0], [1.0, 2.001], False),
    ([1.0, 2.0], [1.0, 2.1], True),
    ([1.0, -inf], [1.0, -inf], False),
    ([1.0, -inf], [9.0, -inf], True),
    ([1.0, -inf], [1.0, inf], True),
    ([1.0, -inf], [1.0, 3.0], True),
    ([1.0, nan], [1.0, nan], False),
    ([1.0, nan], [1.0, 3.0], True),
    ([], [], False),
])
def test_outputs_differ_by_more_than_rounding_or_by_what_is_not_finite(one, other, expected):
    assert differ(torch.tensor(one), torch.tensor(other)) is expected
