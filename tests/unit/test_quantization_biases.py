import numpy as np
import pytest

from de_ray.quantization.biases import FINEST, quantize_biases, quantize_dense, relative_steps

TENSORS = {"a.bias": np.array([0.5, -0.3, 0.011], np.float32), "b.bias": np.array([[40.0], [1.0]], np.float32)}


def test_values_become_the_nearest_multiples_of_the_step():
    tensor = quantize_dense("b", np.array([0.26, -0.9, 0.0], np.float32), 0.25)
    assert tensor.symbols.tolist() == [1, -4, 0] and tensor.symbols.dtype == np.int32
    assert tensor.dequantize().tolist() == [0.25, -1.0, 0.0]
    assert tensor.name == "b" and tensor.levels is None


@pytest.mark.parametrize("values, step, words", [([1.0], 0.0, "above 0"), ([1.0], -1.0, "above 0"),
                                                 ([1.0], np.inf, "finite"), ([np.nan], 1.0, "diverged"),
                                                 ([1.0], 1e-9, "2\\^-24")])
def test_impossible_steps_and_values_are_named(values, step, words):
    with pytest.raises(ValueError, match=words):
        quantize_dense("b", np.array(values, np.float32), step)


def squared_error(values):
    return float(sum(np.sum(((values[name] - TENSORS[name]) / np.abs(TENSORS[name]).max()) ** 2) for name in TENSORS))


@pytest.mark.parametrize("limit", [1e-1, 1e-3, 1e-6])
def test_the_coarsest_step_within_the_limit_is_taken(limit):
    quantized = quantize_biases(TENSORS, squared_error, limit)
    rungs = {round(-np.log2(tensor.step / np.abs(TENSORS[name]).max())) for name, tensor in quantized.items()}
    assert len(rungs) == 1  # one relative step for all tensors
    rung = rungs.pop()
    assert squared_error({name: tensor.dequantize() for name, tensor in quantized.items()}) <= limit
    for coarser in range(rung):
        steps = relative_steps(TENSORS, coarser)
        assert squared_error({n: quantize_dense(n, v, steps[n]).dequantize() for n, v in TENSORS.items()}) > limit


def test_failures_do_not_count_as_within_the_limit():
    calls = []

    def measure(values):
        calls.append(values)
        return np.nan if len(calls) < 4 else 0.0

    quantized = quantize_biases(TENSORS, measure, 1.0)
    assert quantized["a.bias"].step == np.float32(0.5 * 2**-3)


def test_an_unreachable_limit_takes_the_finest_step_and_says_so(caplog):
    quantized = quantize_biases(TENSORS, lambda values: 1.0, 0.5)
    assert "no step" in caplog.text
    assert quantized["a.bias"].step == np.float32(0.5 * 2.0**-FINEST)


def test_tensors_of_zeros_and_no_tensors():
    quantized = quantize_biases({"z": np.zeros(3, np.float32), **TENSORS}, lambda values: 0.0, 0.0)
    assert quantized["z"].dequantize().tolist() == [0, 0, 0]
    assert quantize_biases({}, lambda values: 0.0, 0.0) == {}
