"""Peak memory of an evaluator of YOLOv3's size: 62 M parameters with random weights, 32 images of 416 x 416.

Builds the replica as an actor does, evaluates candidates of an early, a middle and the last layer and of all layers at
once on the first calibration batch, and reports the process's peak after each. The last line is one JSON object.

    python tests/benchmarks/bench_memory.py
"""

import argparse
import json
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from de_ray.device import threads
from de_ray.evaluation.engine import Engine
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evolution.candidate import ZeroingSet
from de_ray.problem.base import Problem
from de_ray.problem.divergence import make_divergence
from de_ray.problem.layers import find_layers

SHARE = 0.005
"""Of a layer's weights, what a candidate zeroes."""


def block(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution and leaky ReLU; batch norm is folded."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.LeakyReLU(0.1, inplace=True))


class Residual(nn.Module):
    """Darknet-53's bottleneck."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.Sequential(block(channels, channels // 2, 1), block(channels // 2, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] of the same shape."""
        return x + self.parts(x)


class YoloV3(nn.Module):
    """Redmon & Farhadi, arXiv:1804.02767: Darknet-53 and three heads of 255 channels; 61.9 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        stages, channels = [], 32
        for count in (1, 2, 8, 8, 4):
            stages.append(nn.Sequential(block(channels, 2 * channels, 3, 2),
                                        *(Residual(2 * channels) for _ in range(count))))
            channels *= 2
        self.stem, self.stages = block(3, 32, 3), nn.ModuleList(stages)
        self.necks, self.heads, self.ups = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for width, extra in ((512, 0), (256, 512), (128, 256)):
            inputs = width + extra if extra else 1024
            self.necks.append(nn.Sequential(block(inputs, width, 1), block(width, 2 * width, 3),
                                            block(2 * width, width, 1), block(width, 2 * width, 3),
                                            block(2 * width, width, 1)))
            self.heads.append(nn.Sequential(block(width, 2 * width, 3), nn.Conv2d(2 * width, 255, 1)))
            self.ups.append(block(width, width // 2, 1) if width > 128 else nn.Identity())

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, 3, 416, 416] -> raw heads [N, 255, 13, 13], [N, 255, 26, 26], [N, 255, 52, 52]."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        outputs, x = [], maps[-1]
        for neck, head, up, skip in zip(self.necks, self.heads, self.ups, (maps[3], maps[2], None), strict=True):
            x = neck(x)
            outputs.append(head(x))
            if skip is not None:
                x = torch.cat([functional.interpolate(up(x), scale_factor=2.0), skip], 1)
        return outputs


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cache-mb", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = YoloV3().eval().requires_grad_(False)
    layers = find_layers(model)
    images = torch.rand(arguments.images, 3, 416, 416)
    problem = Problem("yolov3", "yolov3", model, layers, images, images, images, make_divergence("mse"),
                      lambda module: {})
    steps = []

    def note(what: str, started: float) -> None:
        steps.append({"what": what, "seconds": time.perf_counter() - started, "peak_mb": replica.peak_mb()})
        print(steps[-1], flush=True)

    with threads(arguments.threads):
        started = time.perf_counter()
        replica = Replica(ReplicaSetup(problem, arguments.batch, "cpu", arguments.threads, arguments.cache_mb))
        assert isinstance(replica._runner, Engine)
        note("replica with the teacher's outputs", started)
        rng = np.random.default_rng(0)
        sets = [ZeroingSet(layer, np.sort(rng.choice(one.size, max(1, int(SHARE * one.size)), replace=False)))
                for layer, one in enumerate(layers)]
        for what, candidate in (("first layer", (sets[0],)), ("middle layer", (sets[len(sets) // 2],)),
                                ("last layer", (sets[-1],)), ("all layers", tuple(sets))):
            started = time.perf_counter()
            replica.evaluate([candidate] * 4, [0])
            note(f"4 candidates of the {what}, a batch", started)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "images": arguments.images,
                      "batch": arguments.batch, "cache_mb": arguments.cache_mb, "steps": steps,
                      "peak_mb": replica.peak_mb()}))


if __name__ == "__main__":
    main()
