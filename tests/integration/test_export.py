"""`python -m de_ray decode` and `export`: what leaves the file is the student, checked by other programs' readers."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import de_ray
from de_ray import codec
from de_ray.__main__ import main
from de_ray.config import EvolutionConfig, QuantizationConfig, RefitConfig
from de_ray.export import OnnxNetwork, to_onnx
from de_ray.problem.build import build_architecture

FILE = Path(__file__).parents[2] / "docs/results/lenet5_mnist-0/student.der"
ort = pytest.importorskip("onnxruntime", reason="needs the extra `export`")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small student of the digits, from a teacher in its own cache."""
    from de_ray.problem.build import build_problem
    from de_ray.schema import compose

    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DE_RAY_CACHE", str(folder / "cache"))
        config = compose(["problem.teacher.epochs=10"])
        problem = build_problem(config.problem, 0)
        result = de_ray.compress(problem.teacher, problem.inputs, sparsity=0.8, evolution=EvolutionConfig(cycles=1),
                                 refit=RefitConfig(steps=20, final_steps=40),
                                 quantization=QuantizationConfig(refit_steps=20))
        yield result.save(folder / "student.der")


def test_decode_writes_the_state_dict_bit_for_bit_with_its_architecture(tmp_path, capsys):
    out = tmp_path / "student.safetensors"
    main(["decode", str(FILE), "-o", str(out)])
    expected, found = codec.decode(FILE), load_file(out)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert b'"architecture":"lenet5"' in out.read_bytes() and capsys.readouterr().out == f"wrote {out}\n"


def test_a_built_in_architecture_is_exported_without_its_problem(tmp_path, capsys):
    out = tmp_path / "lenet5.onnx"
    main(["export", str(FILE), "--onnx", str(out)])
    assert json.loads(capsys.readouterr().out)["onnx"]["bytes"] == out.stat().st_size
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    student, inputs = de_ray.load(FILE, model=build_architecture("lenet5")), torch.randn(5, 1, 28, 28)
    with torch.inference_mode():
        assert np.allclose(session.run(None, {"input": inputs.numpy()})[0], student(inputs), atol=1e-4)


def test_the_digits_are_exported_in_float_and_in_int8_that_agrees_with_the_student(digits, tmp_path, capsys):
    import onnx

    full, small = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    main(["export", str(digits), "--onnx", str(full), "--int8", str(small), "problem=digits",
          "problem.teacher.epochs=10"])
    told = json.loads(capsys.readouterr().out)
    assert told["onnx"]["metrics"] == told["student"]["metrics"]
    assert told["onnx"]["from_student"] == {"divergence": pytest.approx(0, abs=1e-6), "agreement": 1.0}
    assert told["int8"]["from_student"]["agreement"] > 0.98 and told["int8"]["from_student"]["divergence"] > 0
    assert small.stat().st_size < 0.4 * full.stat().st_size
    graph = onnx.load(small).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    assert len(weights) == 3 and all(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights)
    # A byte of each sign would let sums of two products overflow on processors without VNNI.
    assert max(np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max() for tensor in weights) <= 64


class Outputs(nn.Module):
    """Convolutions, and outputs in a dict, a tuple and a list, a number among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict:
        y = torch.relu(self.conv(x))
        return {"map": y, "count": 3, "rest": (self.fc(y.mean((2, 3))), [y.amax((2, 3))])}


def test_structured_outputs_keep_their_structure():
    torch.manual_seed(0)
    module, inputs = Outputs().eval(), torch.randn(3, 2, 6, 6)
    with torch.inference_mode():
        expected = module(inputs)
    network = OnnxNetwork(to_onnx(module, inputs[:2]), expected)
    got = network(inputs)
    assert got.keys() == expected.keys() and isinstance(got["rest"], tuple) and isinstance(got["rest"][1], list)
    assert torch.allclose(got["rest"][1][0], expected["rest"][1][0], atol=1e-5)
    assert got["count"] == 3


class ModelOutput(OrderedDict):
    """As libraries have them, of which PyTorch's tree of outputs knows nothing."""


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> ModelOutput:
        scores = self.fc(x)
        return ModelOutput(scores=scores, best=scores.argmax(1))


def test_outputs_of_a_mapping_of_ones_own_are_exported():
    module, inputs = Wrapped().eval(), torch.randn(5, 4)
    with torch.inference_mode():
        expected = module(inputs)
    got = OnnxNetwork(to_onnx(module, inputs[:2]), expected)(inputs)
    assert torch.allclose(got["scores"], expected["scores"], atol=1e-6) and torch.equal(got["best"], expected["best"])


class Branching(nn.Module):
    """Asks its inputs what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


def test_a_network_that_cannot_be_exported_is_one_clear_error():
    with pytest.raises(ValueError, match="cannot be exported to ONNX"):
        to_onnx(Branching().eval(), torch.randn(2, 4))


@pytest.mark.parametrize(("arguments", "message"), [
    (["decode", "no.der", "-o", "new"], "no.der: no such file"),
    (["decode", str(FILE), "-o", "there"], "-o='there': there is such a file already"),
    (["decode", str(FILE), "-o", "absent/new"], "-o='absent/new': no such folder"),
    (["export", str(FILE), "--onnx", "there"], "--onnx='there': there is such a file already"),
    (["export", str(FILE), "--onnx", "a", "--int8", "there", "problem=digits"], "--int8='there'"),
    (["export", str(FILE), "--onnx", "a", "--int8", "a", "problem=digits"], "another file than --onnx"),
    (["export", str(FILE), "--onnx", "a", "--int8", "b"], "expected a problem beside it"),
    (["export", str(FILE), "--onnx", "a", "evolution.sparsty=1"], "sparsty"),
])
def test_a_mistake_is_one_error_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_bytes(b"kept")
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert str(error.value).startswith("error: ") and message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_bytes() == b"kept"


def test_a_custom_networks_file_asks_for_its_problem_and_unknown_options_are_refused(tmp_path, capsys):
    torch.manual_seed(0)
    file = de_ray.compress(nn.Sequential(nn.Linear(6, 4)), torch.randn(60, 6), sparsity=0.25, divergence="mse",
                           evolution=EvolutionConfig(cycles=1), refit=RefitConfig(steps=1, final_steps=1),
                           quantization=QuantizationConfig(refit_steps=1)).save(tmp_path / "own.der")
    with pytest.raises(SystemExit, match="is not built in|name its problem"):
        main(["export", str(file), "--onnx", str(tmp_path / "own.onnx")])
    with pytest.raises(SystemExit) as error:
        main(["export", str(file), "--onnx", "a", "--int4", "b"])
    assert error.value.code == 2 and "--int4" in capsys.readouterr().err
