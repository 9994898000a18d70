"""Networks of several arguments."""

import copy
import sys
import textwrap

import mlflow
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import de_ray
from de_ray import codec
from de_ray.__main__ import export
from de_ray.config import EvolutionConfig, ProblemConfig, QuantizationConfig, RefitConfig
from de_ray.evaluation.capture import capture
from de_ray.export import OnnxNetwork, to_onnx
from de_ray.problem.arrays import load_inputs
from de_ray.problem.augment import augmentation
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.problem.custom import problem_from_model
from de_ray.problem.packing import Packing, packing_of, take_arguments, take_packed
from de_ray.serving import Predictor, saver

SHORT = {"evolution": EvolutionConfig(cycles=2, generations=1, population=8),
         "refit": RefitConfig(steps=5, final_steps=5), "quantization": QuantizationConfig(refit_steps=5)}


class Reader(nn.Module):
    """Tokens and their mask, by name, as language models take them; what is masked does not count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.body, self.head = nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor | None = None) -> dict:
        found = self.body(self.words(input_ids)).relu()
        if attention_mask is not None:
            assert attention_mask.dtype == torch.bool
            found = found * attention_mask.unsqueeze(-1)
        return {"logits": self.head(found.sum(1))}


class Two(nn.Module):
    """An image and a row of a table, by position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.table, self.head = nn.Conv2d(1, 6, 3), nn.Linear(5, 7), nn.Linear(13, 4)

    def forward(self, image: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        seen = self.conv(image).relu().mean((2, 3))
        return self.head(torch.cat([seen, self.table(row.view(-1, 5)).relu()], 1))


def tokens(samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 10, (samples, 1), generator=generator)
    return {"attention_mask": torch.arange(9) < lengths,
            "input_ids": torch.randint(30, (samples, 9), generator=generator, dtype=torch.int32)}


def pairs(samples: int) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(samples, 1, 8, 8))), rng.normal(size=(samples, 5)).astype(np.float16)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


@given(st.data())
def test_arguments_come_back_bit_for_bit(data):
    samples = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    arguments = {}
    for place in range(data.draw(st.integers(1, 4))):
        shape = (samples, *data.draw(st.lists(st.integers(1, 5), max_size=3)))
        dtype = data.draw(st.sampled_from([np.float32, np.int64, np.bool_]))
        kind, below = {np.float32: (np.int32, 2**31), np.int64: (np.int64, 2**62), np.bool_: (np.int8, 2)}[dtype]
        arguments[f"x{place}"] = torch.from_numpy(rng.integers(below, size=shape, dtype=kind)).view(
            torch.from_numpy(np.empty(0, dtype)).dtype)  # NaN of all payloads among them
    packing = Packing.of(arguments)
    packed = packing.pack(dict(reversed(arguments.items())), "calibration")
    assert packed.dtype == torch.int64 and packed.ndim == 2 and len(packed) == samples
    order = torch.randperm(samples)
    for value, found in zip(arguments.values(), packing.values(packed[order]), strict=True):
        assert found.dtype == value.dtype and found.shape == value.shape and bits(found) == bits(value[order])
        assert found.is_contiguous()


@pytest.mark.parametrize(("model", "inputs"), [(Reader(), tokens), (Two(), pairs)])
def test_a_network_of_several_arguments_is_compressed_and_called_as_before(model, inputs, tmp_path):
    before = copy.deepcopy(model.state_dict())
    result = de_ray.compress(model, inputs(80), sparsity=0.7, device="cpu", **SHORT)
    assert packing_of(model) is None and all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert result.report["sparsity"] == pytest.approx(0.7, abs=0.05)
    new = [value.float() if value.is_floating_point() else value for value in
           (torch.as_tensor(one) for one in (inputs(7).values() if inputs is tokens else inputs(7)))]
    called = ((), dict(zip(inputs(1), new, strict=True))) if inputs is tokens else (new, {})
    state = de_ray.load(result.save(tmp_path / "student.der"))
    assert state.keys() == before.keys()
    loaded = de_ray.load(tmp_path / "student.der", model=copy.deepcopy(model))
    for module in (result.model, result.student):
        with torch.no_grad():
            expected, got = loaded(*called[0], **called[1]), module(*called[0], **called[1])
        assert torch.equal(*(one if inputs is pairs else one["logits"] for one in (expected, got)))


@pytest.mark.parametrize(("model", "inputs"), [(Reader(), tokens), (Two(), pairs)])
@pytest.mark.parametrize("samples", [3, 40])
def test_networks_of_several_arguments_are_run_in_parts(model, inputs, samples):
    problem = problem_from_model(model, inputs(samples))
    program = capture(problem.teacher, problem.inputs)
    expected = problem.teacher(problem.held_out)
    got = program.outputs(problem.held_out)
    assert torch.allclose(*(one if inputs is pairs else one["logits"] for one in (got, expected)), atol=1e-5)


def test_held_out_arguments_are_told_apart_by_their_names():
    held_out = {name: value.long() if name == "input_ids" else value for name, value in tokens(60).items()}
    problem = problem_from_model(Reader(), tokens(40), held_out=dict(reversed(held_out.items())))
    assert problem.held_out.equal(Packing.of(held_out).pack(held_out, ""))


@pytest.mark.parametrize(("change", "message"), [
    ({"input_ids": torch.ones(41, 9)}, r"calibration has \{'attention_mask': 40, 'input_ids': 41\} samples: expected"),
    ({"input_ids": [[1] * 9] * 40}, r"calibration\['input_ids'\]='list': expected one array or tensor"),
    ({"input_ids": torch.full((40, 9), 30)}, r"inputs attention_mask \[N, 9\] of torch.bool, input_ids \[N, 9\] of "
                                             r"torch.int64: IndexError"),
    ({"labels": torch.ones(40, 9)}, r"unexpected keyword argument 'labels'"),
    ({3: torch.ones(40, 9)}, r"calibration has \['attention_mask', 'input_ids', 3\]: expected names of arguments"),
    ({"input_ids": torch.full((40, 9), float("nan"))}, r"calibration\['input_ids'\]: holds NaN"),
])
def test_arguments_that_do_not_fit_are_a_value_error(change, message):
    with pytest.raises(ValueError, match=message):
        problem_from_model(Reader(), tokens(40) | change)


def test_held_out_arguments_must_be_those_of_calibration():
    with pytest.raises(ValueError, match=r"held_out has input_ids .*: expected attention_mask \[N, 9\] of torch.bool"):
        problem_from_model(Reader(), tokens(40), held_out={"input_ids": tokens(9)["input_ids"]})
    with pytest.raises(ValueError, match="held_out is a Tensor: expected a dict, as calibration is"):
        problem_from_model(Reader(), tokens(40), held_out=torch.ones(4, 9))
    with pytest.raises(ValueError, match="held_out is a dict: expected a Tensor, as calibration is"):
        problem_from_model(nn.Linear(9, 2), torch.ones(40, 9), held_out=tokens(40))
    with pytest.raises(ValueError, match="calibration is empty: expected at least one argument"):
        problem_from_model(Reader(), ())


def test_classes_that_lie_last_are_told_by_any_argument_of_tokens():
    class Language(Reader):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.words(input_ids))) * attention_mask.unsqueeze(-1)

    with pytest.raises(ValueError, match=r"kl takes dimension 1 for the classes: expected logits.transpose\(1, 2\)"):
        problem_from_model(Language(), tokens(40))


def test_a_network_that_changes_its_arguments_is_given_copies():
    class Careless(Two):
        def forward(self, image: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            return super().forward(image.mul_(2), row.add_(1))

    problem = problem_from_model(Careless(), pairs(40))
    for inputs in (problem.held_out, problem.held_out[:1]):
        before = inputs.clone()
        first, again = problem.teacher(inputs), problem.teacher(inputs)
        assert torch.equal(first, again) and torch.equal(inputs, before)


def test_arguments_of_equal_length_are_spliced_alike():
    arguments = {"ids": torch.arange(600).reshape(50, 12), "mask": torch.rand(50, 12) < 0.5, "age": torch.rand(50),
                 "image": torch.rand(50, 1, 6, 6)}
    packing = Packing.of(arguments)
    arguments["mask"] = arguments["ids"] % 3 == 0
    packed = packing.pack(arguments, "calibration")
    ids, mask, age, image = packing.values(
        augmentation("auto", packed, 1.0, packing)(packed, torch.Generator().manual_seed(0)))
    changed = ids != arguments["ids"]
    assert 0.2 < changed.float().mean() < 0.8  # spans of any length
    assert torch.equal(mask, ids % 3 == 0)
    assert torch.equal(age, arguments["age"]) and not torch.equal(image, arguments["image"])
    shifted = packing.values(augmentation("shift", packed, 1.0, packing)(packed, torch.Generator().manual_seed(0)))
    assert torch.equal(shifted[0], arguments["ids"]) and not torch.equal(shifted[3], arguments["image"])
    assert augmentation("none", packed, 1.0, packing) is None
    alone = Packing.of({"age": arguments["age"]})
    assert augmentation("auto", alone.pack({"age": arguments["age"]}, ""), 1.0, alone) is None
    with pytest.raises(ValueError, match=r"problem.augment='shift': expected images \[N, C, H, W\], got age \[N\] of"):
        augmentation("shift", alone.pack({"age": arguments["age"]}, ""), 1.0, alone)


@pytest.mark.parametrize("features", [2, 32])  # fewer and more of them than tokens
def test_features_of_tokens_stay_with_their_masks(features):
    lengths = torch.randint(2, 9, (50, 1), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < lengths
    arguments = {"states": torch.rand(50, 8, features) * mask[:, :, None] + mask[:, :, None], "mask": mask,
                 "table": torch.rand(50, 5)}
    packing = Packing.of(arguments)
    packed = packing.pack(arguments, "calibration")
    states, mask, table = packing.values(
        augmentation("auto", packed, 1.0, packing)(packed, torch.Generator().manual_seed(0)))
    assert torch.equal((states != 0).any(2), mask) and not torch.equal(mask, arguments["mask"])
    assert not torch.equal(table, arguments["table"])


def test_arguments_that_the_network_does_not_take_are_told_with_those_that_it_does():
    wrong = {"ids": tokens(40)["input_ids"]}
    with pytest.raises(ValueError, match=r"its forward takes \(input_ids: .*attention_mask: "):
        problem_from_model(Reader(), wrong)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a network of two arguments and an archive of inputs by name."""
    source = """
        import torch
        from torch import nn

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.words, self.body, self.head = nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(26, 5)

            def forward(self, ids, *, numbers):
                return self.head(torch.cat([self.body(self.words(ids)).relu().mean(1), numbers], 1))
    """
    (tmp_path / "both_arguments.py").write_text(textwrap.dedent(source))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "inputs.npz", ids=rng.integers(0, 30, (40, 9)), numbers=rng.normal(size=(40, 2)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("both_arguments", None)


def compressed(model: str, calibration: str) -> tuple[Problem, ProblemConfig]:
    """A problem and its configuration, its network written unchanged to `student.der`."""
    config = ProblemConfig(name="custom", model=model, calibration=calibration, divergence="mse")
    problem = build_problem(config, seed=0)
    with open("student.der", "wb") as file:
        file.write(codec.encode([], problem.teacher.state_dict(), problem.architecture))
    return problem, config


def test_mlflow_loads_a_network_of_several_arguments_by_their_names(folder):
    problem, config = compressed("both_arguments:Both", "inputs.npz")
    save = saver(problem, folder / "student.der", problem.teacher, config)
    save(path=folder / "model", metadata=mlflow.models.Model())
    model = mlflow.pyfunc.load_model(str(folder / "model"))
    inputs = dict(np.load("inputs.npz"))
    inputs["numbers"] = inputs["numbers"].astype(np.float32)
    assert model.metadata.get_input_schema().input_names() == ["ids", "numbers"]
    packing = packing_of(problem.teacher)
    expected = problem.teacher(packing.pack({name: torch.from_numpy(value) for name, value in inputs.items()}, ""))
    assert np.allclose(model.predict(inputs), expected.numpy(), atol=1e-6)
    predictor = Predictor(take_arguments(problem.teacher), packing=packing)
    with pytest.raises(ValueError, match=r"inputs=\{'ids'\}: expected a dict of ids, numbers"):
        predictor.predict({"ids": inputs["ids"]})
    with pytest.raises(ValueError, match="inputs='ndarray': expected a dict of ids, numbers"):
        predictor.predict(inputs["ids"])
    with pytest.raises(ValueError, match="ids='torch.float64': expected whole numbers"):
        predictor.predict(inputs | {"ids": inputs["ids"] + 0.5})
    with pytest.raises(ValueError, match=r"numbers \[N, 1\] of torch.float32: expected ids"):
        predictor.predict(inputs | {"numbers": inputs["numbers"][:, :1]})


def test_onnx_has_the_arguments_by_their_names(folder, capsys):
    import onnxruntime

    compressed("both_arguments:Both", "inputs.npz")
    export("student.der", "float.onnx", "int8.onnx", ["problem=custom", "problem.model=both_arguments:Both",
                                                      "problem.calibration=inputs.npz", "problem.divergence=mse"])
    told = capsys.readouterr().out
    assert '"divergence"' in told
    session = onnxruntime.InferenceSession("float.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["ids", "numbers"]


def test_positional_arguments_are_exported():
    model, packing = Two().eval(), Packing.of(tuple(map(torch.as_tensor, (torch.rand(6, 1, 8, 8), torch.rand(6, 5)))))
    arguments = torch.rand(6, 1, 8, 8), torch.rand(6, 5)
    expected = model(*arguments).detach()
    take_packed(model, packing)
    packed = packing.pack(arguments, "")
    network = OnnxNetwork(to_onnx(model, packed[:2]), expected, packing)
    assert torch.allclose(network(packed), expected, atol=1e-5)
    assert packing_of(model) == packing and packing_of(take_arguments(model)) is None


def test_a_damaged_archive_is_a_value_error(folder):
    whole, rng = (folder / "inputs.npz").read_bytes(), np.random.default_rng(0)
    np.savez_compressed("packed.npz", **np.load("inputs.npz"))
    for data in (whole, (folder / "packed.npz").read_bytes()):
        refused = 0
        for _ in range(60):
            damaged = bytearray(data)
            start = int(rng.integers(len(data) - 20))
            damaged[start:start + 20] = rng.integers(0, 256, 20, dtype=np.uint8).tobytes()
            (folder / "damaged.npz").write_bytes(damaged)
            try:
                load_inputs("damaged.npz", "problem.calibration")
            except ValueError as error:
                assert str(error).startswith("problem.calibration")
                refused += 1
        assert refused > 30


def test_archives_without_names_are_positional(folder):
    rng = np.random.default_rng(0)
    np.savez("two.npz", rng.integers(0, 30, (40, 9)), rng.normal(size=(40, 2)))
    np.savez("one.npz", rng.normal(size=(40, 6)))
    (folder / "plain_arguments.py").write_text(
        "from torch import nn\nfrom both_arguments import Both\n"
        "class Plain(Both):\n    def forward(self, ids, numbers):\n"
        "        return super().forward(ids, numbers=numbers)\n"
        "class One(nn.Linear):\n    def __init__(self):\n        super().__init__(6, 3)\n")
    two = build_problem(ProblemConfig(name="custom", model="plain_arguments:Plain", calibration="two.npz"), seed=0)
    assert [field.place for field in packing_of(two.teacher).fields] == [0, 1]
    assert [field.name for field in packing_of(two.teacher).fields] == ["input0", "input1"]
    one = build_problem(ProblemConfig(name="custom", model="plain_arguments:One", calibration="one.npz"), seed=0)
    assert packing_of(one.teacher) is None and one.inputs.shape == (32, 6)
    sys.modules.pop("plain_arguments")
