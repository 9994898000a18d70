"""A segmenter through the whole pipeline: from scenes of real items to a file that loads into an architecture."""

import dataclasses

import pytest
import torch

import de_ray
from de_ray.device import threads
from de_ray.pipeline import run
from de_ray.problem.build import build_architecture, build_problem
from de_ray.problem.datasets import LabelledImages, load_mnist
from de_ray.schema import compose

SMALL = ["problem=fashion_scenes", "pool=serial", "problem.data.size=64", "problem.data.scenes=32",
         "problem.teacher.epochs=1", "problem.teacher.batch=8", "problem.calibration_size=8", "evolution.sparsity=0.8",
         # Some layers of the backbone and of each head: levels of all would take half a minute to place.
         "problem.include=[model.9.*,model.22.proto.*,model.22.cv*.0.*]",
         "evolution.cycles=2", "evolution.generations=1", "evolution.population=4", "evolution.saliency_inputs=8",
         "refit.steps=2", "refit.final_steps=4", "refit.batch=4", "refit.precision=bfloat16", "quantization.bits=4",
         "quantization.refit_steps=2"]


@pytest.fixture(scope="module")
def compressed(data_root, tmp_path_factory):
    """A problem whose teacher has hardly learned, and its compressed form."""
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setenv("DE_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        items = LabelledImages(*(part[:256] for part in dataclasses.astuple(load_mnist("FashionMNIST"))))
        patch.setattr("de_ray.problem.scenes_problem.load_mnist", lambda name: items)
        config = compose(SMALL)
        problem = build_problem(config.problem, 0)
        yield problem, run(problem, config)


def test_a_segmenter_is_compressed_and_reported_by_boxes_and_masks(compressed):
    problem, result = compressed
    report = result.report
    assert report["sparsity"] >= 0.8 and report["decoded_equals_student"]
    for who in ("teacher", "student", "decoded"):
        assert {"AP50", "agreement_80", "mask_AP", "mask_AP50", "mask_agreement_80"} <= report[who].keys()
    assert report["student"] == report["decoded"]
    assert any("proto.upsample" in layer["name"] for layer in report["layers"])


def test_the_file_loads_into_the_architecture_that_it_names(compressed, tmp_path):
    problem, result = compressed
    network = de_ray.load(result.save(tmp_path / "student.der"), model=build_architecture("fashion_scenes"))
    with torch.inference_mode(), threads(1):
        ours, theirs = result.model(problem.held_out), network(problem.held_out)
    assert ours["prototypes"].equal(theirs["prototypes"])
    assert all(a.equal(b) for key in ("boxes", "scores", "coefficients")
               for a, b in zip(ours[key], theirs[key], strict=True))


def test_pictures_show_masks_beside_the_teachers(compressed):
    problem, result = compressed
    figure = problem.pictures({"decoded file": result.model})
    assert len(figure.axes) == 2 * min(6, len(problem.held_out))
