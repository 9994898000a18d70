import copy
import logging
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from de_ray.config import DataConfig, ProblemConfig, TeacherConfig
from de_ray.device import threads
from de_ray.evaluation.capture import capture
from de_ray.problem import ultralytics_problem
from de_ray.problem.anchor_free import decode
from de_ray.problem.build import build_architecture, build_problem
from de_ray.problem.layers import find_layers
from de_ray.problem.ultralytics import (
    SILENT,
    _packaged,
    architecture_name,
    build_network,
    definitions,
    load_network,
    raw_heads,
    read_yaml,
)

IMAGES = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def lived_in(name: str) -> nn.Module:
    """A network whose batch norms have seen something, so that fusing them matters."""
    network = build_network(name).eval()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network


@pytest.fixture(scope="module")
def segmenter() -> nn.Module:
    return raw_heads(lived_in("yolov8n-seg.yaml"))


# Parameters with batch norm fused and without the fixed weights that take expectations; 103.7 and 12.2 million for the
# two forms of YOLOv3, which are not Darknet's 61.9 and 8.8.
@pytest.mark.parametrize(("name", "parameters", "strides", "prototypes"), [
    ("yolov3u.yaml", 103_725_904, (8, 16, 32), 0), ("yolov3-tinyu.yaml", 12_168_768, (16, 32), 0),
    ("yolov8n.yaml", 3_151_888, (8, 16, 32), 0), ("yolo11n.yaml", 2_616_232, (8, 16, 32), 0),
    ("yolov8n-seg.yaml", 3_404_496, (8, 16, 32), 32)])
def test_raw_heads_decode_to_what_the_package_itself_makes_of_them(name, parameters, strides, prototypes):
    network = lived_in(name)
    with torch.no_grad(), threads(1):
        expected = copy.deepcopy(network).fuse(verbose=False)(IMAGES[:2])[0]
        wrapped = raw_heads(network)
        output = wrapped(IMAGES[:2])
    if prototypes:
        expected, planes = expected
        torch.testing.assert_close(output["prototypes"], planes, rtol=1e-4, atol=1e-5)
        together = torch.cat([one.flatten(2) for one in output["coefficients"]], 2)
        torch.testing.assert_close(together, expected[:, 84:], rtol=1e-4, atol=1e-5)
    boxes, scores = decode(output, wrapped.head)  # corners, where the package has centre and size
    found = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], 2)
    torch.testing.assert_close(found.transpose(1, 2), expected[:, :4], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores.transpose(1, 2), expected[:, 4:84], rtol=1e-4, atol=1e-6)
    assert (wrapped.head.strides, wrapped.head.coefficients) == (strides, prototypes)
    assert sum(p.numel() for p in wrapped.parameters()) == parameters


@pytest.mark.parametrize("name", ["yolov3-tinyu.yaml", "yolov8n-seg.yaml"])
def test_networks_are_captured_for_any_number_of_images(name):
    network = raw_heads(lived_in(name))
    with torch.no_grad(), threads(1):
        found = capture(network, IMAGES).outputs(IMAGES[:1])
        expected = network(IMAGES[:1])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (found[key], value)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_bytes_are_the_same_images(segmenter):
    pixels = (255 * IMAGES).round().to(torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(segmenter(pixels)["scores"], segmenter(pixels.float() / 255)["scores"])


def test_the_fixed_weights_of_expectations_are_left_out_and_prototypes_can_be_compressed(segmenter):
    names = [layer.name for layer in find_layers(segmenter)]
    assert not any("dfl" in name for name in (*names, *segmenter.state_dict()))
    assert "model.22.proto.upsample.0" in names
    assert sum(p.numel() for p in segmenter.parameters() if p.ndim > 1) == sum(
        layer.size for layer in find_layers(segmenter))


def test_copies_and_pickles_are_networks_of_their_own(segmenter):
    with torch.no_grad():
        expected = segmenter(IMAGES)["boxes"][0]
        for twin in (copy.deepcopy(segmenter), pickle.loads(pickle.dumps(segmenter))):
            assert twin(IMAGES)["boxes"][0].equal(expected)
            twin.model[0].conv.weight.zero_()
            assert not twin(IMAGES)["boxes"][0].equal(expected)
    assert segmenter(IMAGES)["boxes"][0].equal(expected)


def in_a_new_process(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_is_imported_offline_silently_and_only_where_it_is_asked_for(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    out = in_a_new_process(
        "import os, sys, torch, de_ray, de_ray.problem.build, de_ray.problem.detection_problem\n"
        "import de_ray.problem.ultralytics as ours\n"
        "assert 'ultralytics' not in sys.modules\n"
        "save = torch.save\n"
        "ours.build_network('yolov8n.yaml')\n"
        "from ultralytics import settings\n"
        "assert torch.save is save and os.environ['YOLO_OFFLINE'] == 'true'\n"
        "assert os.environ['YOLO_AUTOINSTALL'] == 'false'\n"
        f"print(any(settings[key] for key in {SILENT!r} if key in settings), settings.file)",
        HOME=str(home), DE_RAY_CACHE=str(tmp_path / "cache"), XDG_CONFIG_HOME=str(home), YOLO_CONFIG_DIR="")
    on, file = out.splitlines()[-1].split(" ", 1)
    assert on == "False"
    assert file.startswith(str(tmp_path / "cache"))
    assert not list(home.rglob("*ltralytics*"))


def test_a_pickled_network_is_opened_with_the_packages_switches_off(segmenter, tmp_path):
    path = tmp_path / "network.pickle"
    path.write_bytes(pickle.dumps(segmenter))
    assert in_a_new_process(
        f"import pickle, os\nnetwork = pickle.load(open({str(path)!r}, 'rb'))\n"
        "from ultralytics import settings\n"
        "print(type(network).__name__, os.environ['YOLO_OFFLINE'], settings['sync'])").endswith("RawHeads true False")


def config(**fields) -> ProblemConfig:
    values = {"name": "ultralytics", "divergence": "detection", "weights": "yolov8n.yaml", "data": DataConfig(size=64)}
    return ProblemConfig(**values | fields)


def network_of(given: ProblemConfig, lacking: list | None = None) -> nn.Module:
    return ultralytics_problem._network(given, 0, [] if lacking is None else lacking)


def test_random_weights_are_the_seeds_and_warned_of(caplog):
    state = torch.get_rng_state()
    one, same, other = (build_network("yolov8n.yaml", seed=seed).model[0].conv.weight for seed in (0, 0, 1))
    assert one.equal(same) and not one.equal(other) and torch.get_rng_state().equal(state)
    network_of(config())
    assert "metrics mean nothing" in caplog.text


def test_a_checkpoint_that_is_a_pickle_is_opened_only_when_the_user_says_so(tmp_path, caplog):
    trained = lived_in("yolov8n.yaml")
    path = tmp_path / "yolov8n.pt"
    torch.save({"model": copy.deepcopy(trained).half(), "ema": None}, path)
    with pytest.raises(ValueError, match=r"problem\.weights=.*pickle.*problem\.trust_checkpoint=true.*safetensors"):
        network_of(config(weights=str(path)))
    found = network_of(config(weights=str(path), trust_checkpoint=True))
    assert "its code runs" in caplog.text
    torch.testing.assert_close(found.model[0].conv.weight, trained.model[0].conv.weight, rtol=1e-3, atol=1e-4)
    assert found.model[0].conv.weight.dtype == torch.float32


def test_a_state_dict_fits_an_architecture_without_any_pickle(tmp_path):
    trained = lived_in("yolov8n.yaml")
    path = tmp_path / "state.safetensors"
    save_file(trained.state_dict(), path)
    found = network_of(config(teacher=TeacherConfig(checkpoint=str(path))))
    assert all(a.equal(b) for a, b in zip(found.state_dict().values(), trained.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"problem\.teacher\.checkpoint=.*expected nothing beside"):
        network_of(config(weights="yolov8n.pt", teacher=TeacherConfig(checkpoint=str(path))))


class OfWindows:
    """A path as a checkpoint that was written on Windows holds it."""

    def __reduce__(self):
        return pathlib.WindowsPath, ("runs/train",)


def test_checkpoints_of_early_versions_and_of_windows_are_opened(tmp_path, monkeypatch):
    tasks = definitions()
    trained = lived_in("yolov8n.yaml")
    with monkeypatch.context() as patched, tasks.temporary_modules({"ultralytics.yolo.utils": "ultralytics.utils"}):
        from ultralytics.utils import IterableSimpleNamespace

        patched.setattr(IterableSimpleNamespace, "__module__", "ultralytics.yolo.utils")
        content = {"model": copy.deepcopy(trained), "train_args": IterableSimpleNamespace(imgsz=640), "at": OfWindows()}
        torch.save(content, tmp_path / "yolov8n.pt")
    assert b"ultralytics.yolo.utils" in (tmp_path / "yolov8n.pt").read_bytes()
    found = load_network(tmp_path / "yolov8n.pt")
    assert all(a.equal(b) for a, b in zip(found.state_dict().values(), trained.state_dict().values(), strict=True))
    assert "ultralytics.yolo.utils" not in sys.modules


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"model": 1})])
def test_a_foreign_checkpoint_is_a_value_error(content, tmp_path):
    path = tmp_path / "own.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.pt'?: not a checkpoint that the installed ultralytics opens"):
        network_of(config(weights=str(path), trust_checkpoint=True))


@pytest.mark.parametrize(("weights", "message"), [
    ("yolov99.yaml", "no YAML of the installed ultralytics has that name; it has .*yolo11.yaml"),
    ("yolov8n-pose.yaml", "a network whose head is Detect or Segment, not Pose"),
    ("yolo26n.yaml", "reg_max=1.*a head with box distributions"),
    ("yolov8n", r"'yolov8n': expected a checkpoint .pt, or a .yaml"),
    ("absent/yolov8n.yaml", "'absent/yolov8n.yaml': no such file"),
])
def test_architectures_that_cannot_be_compressed_say_why(weights, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        raw_heads(network_of(config(weights=weights)))


def test_a_yaml_that_describes_no_network_or_holds_a_program_is_refused(tmp_path):
    (tmp_path / "coco.yaml").write_text("names: {0: person}\n")
    with pytest.raises(ValueError, match="'coco.yaml': expected a network's YAML"):
        build_network(str(tmp_path / "coco.yaml"))
    path = own_yaml(tmp_path, "(open('pwned', 'w'), torch.nn.ReLU())[1]")
    with pytest.raises(ValueError, match="expected an activation such as"):
        build_network(str(path))


def test_everything_that_is_missing_is_named_at_once(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("DE_RAY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        build_problem(config(weights="yolov8n.pt"), seed=0)
    for said in (str(tmp_path / "ultralytics" / "yolov8n.pt"), "github.com", ".yaml", "problem.data.root="):
        assert said in str(error.value)


def test_a_segmenter_of_real_images_is_a_problem_that_says_what_it_is(data_root, caplog):
    caplog.set_level(logging.INFO)
    data = DataConfig(root=str(data_root / "coco"), size=64, workers=0)
    with threads(1):
        problem = build_problem(config(weights="yolov8n-seg.yaml", data=data, calibration_size=4, inputs_size=4), 0)
        output = problem.teacher(problem.inputs[:2])
        metrics = problem.metrics(problem.teacher)
    assert "yolov8n-seg for 80 classes: 3,404,496 parameters" in caplog.text
    assert problem.divergence(output, output).eq(0).all()
    assert {"AP", "mask_AP", "mask_AP50", "mask_agreement_80", "mask_false_80"} <= metrics.keys()
    fresh = build_architecture(problem.architecture)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in problem.teacher.state_dict().items()}


def test_yolov3u_is_said_not_to_be_the_papers(caplog):
    ultralytics_problem._say(nn.Linear(2, 2), "yolov3:80")
    assert "not the YOLOv3 of Redmon and Farhadi" in caplog.text


@pytest.mark.parametrize("name", ["ultralytics:../own:80", "ultralytics:/tmp/own:80", "ultralytics:yolov8n",
                                  "ultralytics:yolov8n:x", "ultralytics:passwd:3"])
def test_a_name_that_a_file_holds_opens_no_file_but_the_packages(name):
    with pytest.raises(ValueError, match="none of the installed ultralytics'"):
        build_architecture(name)


def test_every_size_of_a_family_is_built_by_its_name():
    definitions()
    assert build_architecture("ultralytics:yolov8n:3").head.classes == 3


def own_yaml(folder, activation, name="yolov8n.yaml"):
    """A copy of the package's yolov8.yaml with an activation of its own."""
    definitions()
    path = folder / name
    path.write_text(f"activation: {activation}\n" + _packaged("yolov8n").read_text())
    return path


def test_a_yaml_in_the_working_folder_is_not_taken_for_the_packages(tmp_path, monkeypatch):
    own_yaml(tmp_path, "nn.ReLU()", "yolov8.yaml")
    own_yaml(tmp_path, "nn.ReLU()")
    monkeypatch.chdir(tmp_path)
    assert "ReLU" not in repr(build_architecture("ultralytics:yolov8n:3"))


def test_a_yaml_of_ones_own_is_built_and_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own_yaml(tmp_path, "torch.nn.ReLU()", "menu.yaml")
    network = build_network("~/menu.yaml", 3)
    assert "ReLU" in repr(network) and architecture_name(network) == "own-menu:3"
    assert architecture_name(build_network(str(own_yaml(tmp_path, "nn.ReLU()")), 3)) == "own-yolov8n:3"
    with pytest.raises(ValueError, match="none of the installed ultralytics'"):
        build_architecture("ultralytics:own-yolov8n:3")


@pytest.mark.parametrize("name", ["yolov8n", "yolov9s", "yolov9t", "yolo12n", "yolov8n-seg", "yolov3-tiny"])
def test_what_is_built_of_the_packages_yaml_has_a_name_that_builds_it_again(name):
    network = build_network(f"{name}.yaml", 3)
    assert architecture_name(network) == f"{name}:3"
    shapes = {key: value.shape for key, value in raw_heads(network).state_dict().items()}
    again = build_architecture(f"ultralytics:{name}:3").state_dict()
    assert shapes == {key: value.shape for key, value in again.items()}


def test_yolov3u_is_the_packages_yolov3():
    assert read_yaml("yolov3u.yaml")["yaml_file"] == "yolov3.yaml"


@pytest.mark.parametrize(("fields", "key"), [
    ({"weights": None}, "weights"), ({"cfg": "a.cfg"}, "cfg"), ({"divergence": "kl"}, "divergence"),
    ({"name": "fashion_scenes"}, "weights"), ({"name": "yolov3", "trust_checkpoint": True}, "trust_checkpoint"),
])
def test_fields_that_do_not_fit_are_refused_by_name(fields, key):
    with pytest.raises(ValueError, match=rf"problem\.{key}=.*: expected"):
        config(**fields)
