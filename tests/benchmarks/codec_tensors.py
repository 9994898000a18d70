"""Integer tensors for bench_codec.py: of a compressed file, or of a network that is pruned and quantized plainly.

    python tests/benchmarks/codec_tensors.py --file docs/results/yolov3_tiny_coco-0/student.der --out student.npz
    python tests/benchmarks/codec_tensors.py --problem yolov3_tiny --prune magnitude --bits 4 --out magnitude.npz
    python tests/benchmarks/codec_tensors.py --problem yolov3_tiny --prune obs --bits 4 --inputs 16 --out obs.npz
    python tests/benchmarks/codec_tensors.py --problem yolov3_tiny --prune sparsegpt --inputs 16 --out sparsegpt.npz

Pruning zeroes the given share of every layer. `magnitude` keeps the largest weights; `obs` keeps those of the largest
w^2 / [H^-1]_pp and refits them by least squares to the layer's own outputs (Hassibi & Stork, 1992); `sparsegpt` prunes
blocks of columns from left to right, those behind making up for it (Frantar & Alistarh, 2023). Quantization is
uniform with one step a layer, symbols in -(2^(bits - 1) - 1)..2^(bits - 1) - 1, the step that has the least squared
error among 100; survivors stay survivors. Kernel axes keep their places, so that a coder may use them.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch

from de_ray.codec.container import symbols_of
from de_ray.evolution.gram import layer_grams
from de_ray.evolution.obs import DAMPING, damped, settle_columns, upper_factor
from de_ray.problem.build import build_problem
from de_ray.schema import compose
from de_ray.student import Student


def quantize(weights: np.ndarray, bits: int) -> np.ndarray:
    """int32 symbols of the weights' shape, 0 for zeros alone."""
    alive, most = weights[weights != 0], 2 ** (bits - 1) - 1
    if not len(alive):
        return np.zeros(weights.shape, np.int32)
    largest = np.abs(alive).max()

    def symbols(step: float, values: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(np.abs(values) / step), 1, most)

    steps = largest / most * np.linspace(0.01, 1, 100)
    errors = [np.square(np.abs(alive) - step * symbols(step, alive)).sum() for step in steps]
    step = steps[int(np.argmin(errors))]
    return np.where(weights != 0, np.sign(weights) * symbols(step, weights), 0).astype(np.int32)


def magnitude(weight: np.ndarray, sparsity: float) -> np.ndarray:
    """The weights of the largest magnitude, zeros elsewhere."""
    keep = max(1, round(weight.size * (1 - sparsity)))
    least = np.partition(np.abs(weight).ravel(), -keep)[-keep]
    return np.where(np.abs(weight) >= least, weight, 0)


def obs(weight: np.ndarray, gram: np.ndarray, sparsity: float, steps: int = 1) -> np.ndarray:
    """Optimal Brain Surgeon in a few steps.

    Args:
        weight: [R, ...], D weights a row.
        gram: float64 [D, D] of the layer's inputs.
        sparsity: to reach.
        steps: between which survivors are refitted.
    """
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    hessian = damped(torch.from_numpy(gram)).numpy()
    wanted = rows @ hessian  # [R, D]: what survivors are to reproduce
    score = 1 / np.diag(np.linalg.inv(hessian))
    pruned = rows
    for step in range(1, steps + 1):
        keep = max(1, round(rows.size * (1 - sparsity) ** (step / steps)))
        saliency = np.square(pruned) * score
        alive = saliency >= max(np.partition(saliency.ravel(), -keep)[-keep], np.finfo(float).tiny)
        pruned = np.zeros_like(rows)
        for row, chosen in enumerate(alive):
            at = np.flatnonzero(chosen)
            if len(at):
                pruned[row, at] = np.linalg.solve(hessian[np.ix_(at, at)], wanted[row, at])
    return pruned.reshape(weight.shape)


def sparsegpt(weight: np.ndarray, gram: np.ndarray, sparsity: float, block: int, damping: float) -> np.ndarray:
    """The weights of the largest w^2 / U_jj^2 in each block of columns, as compensated so far (arXiv:2301.00774).

    Args:
        weight: [R, ...], D weights a row.
        gram: float64 [D, D] of the layer's inputs.
        sparsity: of each block.
        block: columns whose survivors are chosen at once.
        damping: a share of the mean diagonal of the Hessian.
    """
    upper = upper_factor(damped(torch.from_numpy(gram), damping))
    rows = torch.from_numpy(weight.reshape(len(weight), -1)).double()
    for start in range(0, rows.shape[1], block):
        stop = min(start + block, rows.shape[1])
        saliency = rows[:, start:stop].square() / upper.diagonal()[start:stop].square()
        gone = max(1, int(saliency.numel() * sparsity))
        alive = saliency > saliency.flatten().kthvalue(gone).values
        own, before = upper[start:stop, start:stop], rows[:, start:stop].clone()
        rows[:, start:stop] = settle_columns(before, own, partial(_kept, alive))
        errors = torch.linalg.solve_triangular(own, before - rows[:, start:stop], upper=True, left=False)
        rows[:, stop:] -= errors @ upper[start:stop, stop:]
    return rows.reshape(weight.shape).float().numpy()


def _kept(alive: torch.Tensor, column: int, values: torch.Tensor) -> torch.Tensor:
    return torch.where(alive[:, column], values, 0)


def pruned_network(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Symbols by layer of a problem's teacher."""
    problem = build_problem(compose([f"problem={arguments.problem}", *arguments.override]).problem, 0)
    student = Student(problem.teacher, problem.layers)
    weights = [weight.detach().numpy() for weight in student.weights]
    if arguments.prune == "magnitude":
        pruned = [magnitude(weight, arguments.sparsity) for weight in weights]
    else:
        inputs = problem.calibration[:arguments.inputs]
        grams = [gram[0].numpy() for gram in layer_grams(student, inputs, 2)]
        if arguments.prune == "obs":
            prune = partial(obs, sparsity=arguments.sparsity, steps=arguments.steps)
        else:
            prune = partial(sparsegpt, sparsity=arguments.sparsity, block=arguments.block, damping=arguments.damping)
        pruned = [prune(weight, gram) for weight, gram in zip(weights, grams, strict=True)]
    return {layer.parameter: quantize(weight, arguments.bits)
            for layer, weight in zip(problem.layers, pruned, strict=True)}


def main() -> None:
    """Write the tensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="a compressed file; its tensors of two or more dimensions are taken")
    parser.add_argument("--problem", default="yolov3_tiny")
    parser.add_argument("--override", nargs="*", default=[], help="of the problem's configuration")
    parser.add_argument("--prune", choices=("magnitude", "obs", "sparsegpt"), default="magnitude")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--inputs", type=int, default=16, help="calibration inputs of obs and sparsegpt")
    parser.add_argument("--steps", type=int, default=1, help="of obs, between which survivors are refitted")
    parser.add_argument("--block", type=int, default=128, help="columns of a step of sparsegpt")
    parser.add_argument("--damping", type=float, default=DAMPING, help="of sparsegpt's layer Hessian")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.file:
        tensors = {name: symbols for name, symbols in symbols_of(arguments.file).items() if symbols.ndim > 1}
    else:
        tensors = pruned_network(arguments)
    np.savez_compressed(arguments.out, **tensors)
    total, alive = (sum(f(t) for t in tensors.values()) for f in (np.size, np.count_nonzero))
    print(f"{arguments.out}: {len(tensors)} tensors, {total:,} weights, {100 * alive / total:.2f} % not zero")


if __name__ == "__main__":
    main()
