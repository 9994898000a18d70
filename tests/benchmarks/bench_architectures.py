"""What `de_ray.compress` makes of other networks than the presets', with nothing set but sparsity and bits.

Small networks of several makes are trained on Fashion-MNIST, once, and kept with the other teachers: residual and
depthwise convolutions with batch norm, a transformer, an LSTM that reads an image row by row, and an autoencoder with
transposed convolutions; and a language model on the characters of Python's own standard library. Each is compressed
with some unlabelled training inputs. The last line is one JSON object.

    python tests/benchmarks/bench_architectures.py --networks residual transformer
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import de_ray
from de_ray.config import TeacherConfig
from de_ray.problem.datasets import load_mnist
from de_ray.problem.teacher import obtain

BATCH = 500
"""Inputs a pass of a measurement."""
CONTEXT, SYMBOLS = 32, 96
"""Characters that the language model sees, and that there are: those of ASCII that can be printed, and all others."""
SEQUENCES, HELD_OUT = 60_000, 4_000
"""Of the language model's training, and apart from it."""


class Residual(nn.Module):
    """A convolution pair with batch norm and a skip, as ResNets have it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(3))
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(functional.relu(self.norms[0](self.first(x)))))
        return functional.relu(y + self.norms[2](self.skip(x)))


class Inverted(nn.Module):
    """A depthwise convolution between two pointwise ones, as MobileNets have it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        wide = expansion * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skips else self.body(x)


def residual() -> nn.Module:
    """Five blocks, from 14 x 14 positions on."""
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 64, 1)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def depthwise() -> nn.Module:
    """Five blocks, from 14 x 14 positions on."""
    blocks = [Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 48, 2), Inverted(48, 48, 1), Inverted(48, 64, 1)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), *blocks,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Transformer(nn.Module):
    """Patches of 4 x 4 pixels, four layers of self-attention."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 49, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2) + self.places).mean(1))


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(28, width, 2, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x.flatten(1, 2))[0][:, -1])


class Language(nn.Module):
    """What comes next after each of some characters; two layers of causal self-attention."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.places = nn.Parameter(0.02 * torch.randn(1, CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=tokens.device)
        hidden = self.encoder(self.embedding(tokens) + self.places, mask)
        return self.head(hidden).transpose(1, 2)  # [N, SYMBOLS, CONTEXT]


def autoencoder() -> nn.Module:
    """An image as 16 numbers, and back."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 16, 7),
        nn.ReLU(), nn.ConvTranspose2d(16, 64, 7), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1))


NETWORKS = {"residual": residual, "depthwise": depthwise, "transformer": Transformer, "recurrent": Recurrent,
            "autoencoder": autoencoder, "language": Language}


def fit(model: nn.Module, inputs: Tensor, targets: Tensor, config: TeacherConfig) -> None:
    """Train a model to tell labels int64 [M] apart, or to give float32 [M, ...] back."""
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.epochs * -(-len(inputs) // config.batch)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps)
    loss_of = functional.mse_loss if targets.is_floating_point() else functional.cross_entropy
    model.train()
    for _ in range(config.epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(config.batch):
            loss = loss_of(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def quality(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Accuracy in percent, or the peak signal-to-noise ratio in dB of pixels that span 1."""
    found = torch.cat([model(part) for part in inputs.split(BATCH)])
    if targets.is_floating_point():
        span = float(targets.max() - targets.min())
        return float(-10 * ((found - targets) / span).square().mean().log10())
    return 100 * float((found.argmax(1) == targets).float().mean())


def characters() -> Tensor:
    """int64 [SEQUENCES + HELD_OUT, CONTEXT + 1]: pieces of the modules of the standard library, shuffled."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8).astype(np.int64)
    codes = torch.from_numpy(np.where((text >= 32) & (text < 127), text - 31, 0))
    pieces = codes[:len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))][:SEQUENCES + HELD_OUT]


def load(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and targets of a network, and held-out ones."""
    if name == "language":
        pieces = characters()
        inputs, targets = pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
        return inputs[HELD_OUT:], targets[HELD_OUT:], inputs[:HELD_OUT], targets[:HELD_OUT]
    data = load_mnist("FashionMNIST")
    if name == "autoencoder":
        return data.train, data.train, data.test, data.test
    return data.train, data.train_labels, data.test, data.test_labels


def measure(name: str, size: int, epochs: int, arguments: dict) -> dict:
    """Compress one network."""
    inputs, targets, test, expected = load(name)
    classifies = not targets.is_floating_point()
    torch.manual_seed(0)
    teacher = obtain(NETWORKS[name](), f"bench_{name}", inputs, targets,
                     TeacherConfig(epochs=epochs, learning_rate=3e-3, weight_decay=0.01), fit)
    started = time.perf_counter()
    result = de_ray.compress(teacher, inputs[:size], held_out=test[:2000],
                             divergence="kl" if classifies else "mse", **arguments)
    seconds = time.perf_counter() - started
    return {"network": name, "parameters": result.report["parameters"], "sparsity": result.report["sparsity"],
            "bytes": len(result.data), "ratio": result.report["ratio"], "seconds": seconds,
            "measure": "accuracy" if classifies else "psnr", "teacher": quality(teacher, test, expected),
            "file": quality(result.model, test, expected), "divergence": result.report["divergence"]}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--inputs", type=int, default=2048, help="unlabelled inputs of the training set")
    parser.add_argument("--augment", default="auto", help="of them: see de_ray.compress")
    parser.add_argument("--epochs", type=int, default=4, help="of the teachers' training")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--bits", type=int, default=4)
    arguments = parser.parse_args()
    chosen = {"sparsity": arguments.sparsity, "bits": arguments.bits, "augment": arguments.augment}
    found = [measure(name, arguments.inputs, arguments.epochs, chosen) for name in arguments.networks]
    print(json.dumps({"threads": torch.get_num_threads(), "networks": found}))


if __name__ == "__main__":
    main()
