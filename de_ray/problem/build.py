"""From configuration to problem."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from de_ray.config import DARKNETS, DETECTORS, ULTRALYTICS, ProblemConfig
from de_ray.problem.augment import augmentation
from de_ray.problem.base import Problem
from de_ray.problem.classifiers import ARCHITECTURES, accuracy
from de_ray.problem.custom import build_custom
from de_ray.problem.datasets import LabelledImages, load_digits, load_mnist
from de_ray.problem.divergence import make_divergence
from de_ray.problem.layers import find_layers
from de_ray.problem.sampling import draw_inputs
from de_ray.problem.teacher import obtain


@dataclass(frozen=True)
class _Classifier:
    """A built-in problem: an architecture and the labelled images that its teacher learns."""

    architecture: str
    load: Callable[[], LabelledImages]


CLASSIFIERS = {
    "digits": _Classifier("digits_mlp", load_digits),
    "lenet300_mnist": _Classifier("lenet300", partial(load_mnist, "MNIST")),
    "lenet5_mnist": _Classifier("lenet5", partial(load_mnist, "MNIST")),
    "lenet300_fashion": _Classifier("lenet300", partial(load_mnist, "FashionMNIST")),
    "lenet5_fashion": _Classifier("lenet5", partial(load_mnist, "FashionMNIST")),
}
PROBLEMS = (*CLASSIFIERS, *DETECTORS, "custom")


def build_problem(config: ProblemConfig, seed: int, device: str = "cpu") -> Problem:
    """The problem that `config` describes; trains its teacher where none is given or cached.

    Args:
        config: what to compress.
        seed: the run's, of the draw of calibration inputs. The teacher has its own.
        device: where a detector looks through all images, for `problem.data.draw=objects`; see `resolve_device`. The
            problem itself is on the CPU.

    Raises:
        ValueError: for an unknown name, layers or sizes outside their ranges, data or weights that are damaged.
        FileNotFoundError: for data sets or files that cannot be found.
    """
    if config.name == "custom":
        return build_custom(config, seed)
    # torchvision and Pillow are slow to import, and classifiers do without them.
    if config.name in DARKNETS:
        from de_ray.problem.detection_problem import build_detector

        return build_detector(config, seed, device)
    if config.name == "ultralytics":
        from de_ray.problem.ultralytics_problem import build_ultralytics

        return build_ultralytics(config, seed, device)
    if config.name == "fashion_scenes":
        from de_ray.problem.scenes_problem import build_scenes

        return build_scenes(config, seed)
    if config.name not in CLASSIFIERS:
        raise ValueError(f"problem.name={config.name!r}: expected one of {', '.join(PROBLEMS)}")
    classifier = CLASSIFIERS[config.name]
    model = build_architecture(classifier.architecture)
    find_layers(model, config.include, config.exclude)  # a mistyped pattern need not wait for data and training
    data = classifier.load()
    augment = augmentation(config.augment, data.train, config.augment_share)
    inputs, calibration = draw_inputs(data.train, config.calibration_size, config.inputs_size, seed, augment)
    teacher = obtain(model, config.name, data.train, data.train_labels, config.teacher).requires_grad_(False)
    return Problem(
        name=config.name,
        architecture=classifier.architecture,
        teacher=teacher,
        layers=find_layers(teacher, config.include, config.exclude),
        inputs=inputs,
        calibration=calibration,
        held_out=data.test,
        divergence=make_divergence(config.divergence),
        metrics=partial(_metrics, data.test, data.test_labels),
        augment=augment,
    )


def build_architecture(name: str) -> nn.Module:
    """A built-in architecture, untrained, as a file's header names it.

    There are digits_mlp, lenet300, lenet5, yolov3_tiny, yolov3, fashion_scenes, and `ultralytics:` with the name of one
    of that package's YAML files and the number of classes, as in ultralytics:yolov8n-seg:80.

    Custom models are never imported by a name that a file holds: give `de_ray.load` the module.

    Raises:
        ValueError: for other names.
    """
    if name in DARKNETS:
        from de_ray.problem.detection_problem import build_darknet

        return build_darknet(name)
    if name == "fashion_scenes":
        from de_ray.problem.scenes_problem import build_segmenter
        from de_ray.problem.ultralytics import raw_heads

        return raw_heads(build_segmenter())
    if name.startswith(ULTRALYTICS):
        from de_ray.problem.ultralytics import build_named

        return build_named(name.removeprefix(ULTRALYTICS))
    if name not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *DARKNETS, "fashion_scenes", f"{ULTRALYTICS}NAME:CLASSES"))
        raise ValueError(f"architecture {name!r} is not built in (there are {known}): "
                         "build the module yourself and pass it to de_ray.load(path, model=...)")
    return ARCHITECTURES[name]()


def _metrics(inputs: Tensor, labels: Tensor, model: nn.Module) -> dict[str, float]:
    return {"accuracy": accuracy(model, inputs, labels)}
