"""Compressions on a simulated GPU: no operation mixes devices."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import de_ray
from de_ray.config import EvolutionConfig, QuantizationConfig, RefitConfig
from de_ray.refit.distill import Distiller
from tests.fake_cuda import CudaTensor, fake_cuda


def compressed(model, inputs, device, **evolution):
    evolution = {"cycles": 2, "population": 6, "generations": 2, "elite": 2, "tournament": 2, "saliency_inputs": 32,
                 "oversample": 2, **evolution}
    return de_ray.compress(model.eval(), inputs, evolution=EvolutionConfig(**evolution),
                           refit=RefitConfig(steps=2, final_steps=2, batch=16),
                           quantization=QuantizationConfig(refit_steps=2), threads=1, progress=False, device=device)


@pytest.mark.parametrize(("model", "shape", "evolution"), [
    (nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)), (12,),
     {"criteria": ["fisher", "obs", "kronecker", "taylor"], "surrogate": "kronecker"}),
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)), (3, 6, 6), {}),
])
def test_a_compression_stays_on_the_gpu_and_gives_its_file_back_on_the_cpu(model, shape, evolution):
    inputs = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    expected = compressed(model, inputs, "cpu", **evolution)
    with fake_cuda():
        found = compressed(model, inputs, "cuda", **evolution)
    assert all(type(one) is CudaTensor for one in found.student.parameters())
    assert all(type(one) is nn.Parameter for one in found.model.parameters())
    assert found.report["sparsity"] == expected.report["sparsity"]
    divergences, those = ([one["divergence"] for one in result.report["history"]] for result in (found, expected))
    assert divergences == pytest.approx(those, rel=1e-4)


class Scaled(nn.Module):
    """Keeps a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(12, 5), torch.linspace(1, 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


class OfOneDevice(nn.Linear):
    """Makes a tensor on a GPU, wherever its inputs are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(5, device="cuda")


@pytest.mark.parametrize(("model", "message"), [
    (Scaled(), r"device='cuda:0': expected cpu, as .*register_buffer"),
    (OfOneDevice(12, 5), r"does not accept .*copied to the CPU: .*device=x\.device"),
])
def test_a_model_of_which_a_part_stays_where_it_is_is_told_of(model, message):
    with fake_cuda(), pytest.raises(ValueError, match=message):
        compressed(model, torch.randn(40, 12), "cuda")


def test_a_gpu_without_room_is_one_error_that_says_what_takes_less(monkeypatch):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(Distiller, "run", full)
    with fake_cuda(), pytest.raises(MemoryError, match=r"allocate 2\.00 GiB\. Lower refit\.memory_mb "):
        compressed(nn.Linear(12, 5), torch.randn(40, 12), "cuda")


def test_a_default_device_other_than_the_cpu_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r"torch\.get_default_device\(\)='meta': expected cpu"):
        compressed(nn.Linear(12, 5, device="cpu"), torch.zeros(40, 12, device="cpu"), "cpu")


def test_what_a_gpu_refuses_the_simulated_one_refuses():
    with fake_cuda():
        there = torch.ones(3, device="cuda")
        for refused in (lambda: there + torch.ones(3), lambda: np.asarray(there), there.numpy,
                        lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
                        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")]):
            with pytest.raises((RuntimeError, TypeError)):
                refused()
        assert (there + torch.tensor(1.0)).cpu().tolist() == [2.0] * 3 and there[torch.tensor([0])].is_cuda
