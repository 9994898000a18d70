"""Processor time of capturing a network in one tracing, and with the second one that makes any graph functional.

    python tests/benchmarks/bench_capture.py

Networks of torchvision with random weights, one thread; each is captured in both ways by turns. The last line is one
JSON object: for each network the medians in seconds and their ratio.
"""

import argparse
import contextlib
import json
import statistics
import time
from unittest import mock

import torch
from torchvision import models

from de_ray.device import threads
from de_ray.evaluation import capture

NETWORKS = {"alexnet": 64, "resnet18": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64,
            "convnext_tiny": 64, "densenet121": 64, "vit_b_16": 224, "swin_t": 64}
"""Side of the images."""


def seconds(module: torch.nn.Module, images: torch.Tensor, again: bool) -> float:
    """Of one capture."""
    with mock.patch.object(capture, "make_functional", lambda graph: False) if again else contextlib.nullcontext():
        start = time.process_time()
        capture.capture(module, images)
        return time.process_time() - start


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments, result = parser.parse_args(), {}
    with threads(1), torch.inference_mode():
        for name in arguments.networks:
            torch.manual_seed(0)
            module, side = getattr(models, name)().eval(), NETWORKS[name]
            images = torch.randn(4, 3, side, side)
            seconds(module, images, True)  # imports what tracing needs
            pairs = [(seconds(module, images, True), seconds(module, images, False)) for _ in range(arguments.repeats)]
            twice, once = map(statistics.median, zip(*pairs, strict=True))
            result[name] = {"twice_s": round(twice, 2), "once_s": round(once, 2), "ratio": round(twice / once, 2)}
            print(f"{name}: {twice:.2f} s, {once:.2f} s", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
