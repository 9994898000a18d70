"""Every configuration in conf/ composes; values out of range and mistyped keys are refused with the way out."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from de_ray import config as schema
from de_ray.config import Config
from de_ray.launch import refuse_unwritable
from de_ray.schema import CONF, compose, refuse_unknown, resumed

CUSTOM = ["problem.model=package.module:build", "problem.calibration=inputs.npy"]
GROUPS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_config_composes_and_holds_to_the_schema(group, name):
    override = f"+{group}={name}" if group in ("experiment", "cluster", "sweep") else f"{group}={name}"
    config = compose([override, *(CUSTOM if (group, name) == ("problem", "custom") else [])])
    assert isinstance(config, Config) and isinstance(config.evolution, schema.EvolutionConfig)


def test_the_default_is_directed_evolution_of_the_digits_on_ray():
    config = compose([])
    assert (config.problem.name, config.evolution.method, config.pool.kind) == ("digits", "directed", "ray")


@pytest.mark.parametrize("override", [
    "evolution.sparsity=1", "evolution.sparsity=-0.1", "evolution.allocation=both", "evolution.cycles=0",
    "evolution.criteria=[fisher,hessian]", "evolution.elite=99", "evolution.screen=0", "+evolution.targets.fc1=1.5",
    "pool.kind=threads", "pool.actors=-1", "pool.threads=0", "pool.threads=2000", "refit.method=sgd",
    "refit.learning_rate=0",
    "quantization.bits=9", "quantization.min_bits=9", "quantization.tolerance=0", "quantization.placement=kmeans",
    "problem.divergence=l1", "problem.augment=mixup", "problem.model=a:b", "problem.calibration_size=0",
    "problem.teacher.epochs=0", "seed=-1", "threads=0", "threads=2000", "device=tpu",
    "target_bytes=0", "target_ratio=1", "evolution.rate_weight=-1", "refit.final_learning_rate=0",
    "evolution.quota_sigma=11", "evolution.temperature=1001", "evolution.rate_weight=inf", "refit.learning_rate=nan",
    "quantization.tolerance=inf", "evolution.population=2", "problem.held_out=a.npy",
])
def test_a_value_out_of_its_range_names_the_key_and_what_is_allowed(override):
    key = override.lstrip("+").split("=")[0]
    with pytest.raises(ValueError, match=r"expected") as error:
        compose([override])
    assert key in str(error.value)


@pytest.mark.parametrize(("group", "values", "message"), [
    ("QuantizationConfig", {"bits": 4.5}, r"quantization\.bits=4\.5: expected a whole number or null"),
    ("EvolutionConfig", {"sparsity": "0.9"}, r"evolution\.sparsity='0\.9': expected a finite number"),
    ("EvolutionConfig", {"criteria": "fisher"}, r"evolution\.criteria='fisher': expected a list, each entry text"),
    ("EvolutionConfig", {"targets": {"fc1": "half"}}, r"evolution\.targets=.*: expected values by key"),
    ("PoolConfig", {"actors": True}, r"pool\.actors=True: expected a whole number"),
    ("RefitConfig", {"relative": "yes"}, r"refit\.relative='yes': expected true or false"),
    ("Config", {"evolution": {"sparsity": 0.5}}, r"^evolution=.*: expected EvolutionConfig\(\.\.\.\)"),
])
def test_a_value_of_another_type_is_refused_before_it_is_compared(group, values, message):
    with pytest.raises(ValueError, match=message):
        getattr(schema, group)(**values)


def test_numbers_of_numpy_are_numbers():
    assert schema.EvolutionConfig(sparsity=np.float32(0.5), cycles=np.int64(3)).cycles == 3


@pytest.mark.parametrize("override", ["evolution.sparsty=0.9", "nonsense=1", "evolution.cycles=many", "problem=mnits",
                                      "evolution=evolved"])
def test_a_mistyped_key_value_or_name_is_refused(override):
    with pytest.raises((HydraException, OmegaConfBaseException)):
        compose([override])


@pytest.mark.parametrize(("override", "meant"), [
    ("evolution.sparsty=0.5", "evolution.sparsity"), ("sparsity=0.9", "evolution.sparsity"),
    ("bits=4", "quantization.bits"), ("evolution.bits=4", "quantization.bits"), ("sparsty=0.9", "evolution.sparsity"),
    ("seeds=1", "seed"), ("quantisation.bits=4", "quantization.bits"), ("problem.data.mosiac=1", "problem.data.mosaic"),
    ("learning_rate=1", "problem.teacher.learning_rate or refit.learning_rate or quantization.learning_rate"),
    ("epochs=1", "problem.teacher.epochs"), ("evolution.sparsity.fc1=0.5", "evolution.sparsity"),
    ("evolution.target.fc1=0.5", "evolution.targets"), ("quantisation=sweep", "quantization"),
    ("experimnt=lenet5_mnist", "experiment"), ("sweep.sample=3", "sweep.samples"),
    ("min_bit=3", "quantization.min_bits")])
def test_a_mistyped_key_is_one_error_that_tells_the_key_that_was_meant(override, meant):
    with pytest.raises(ValueError, match=rf"^{override}: no such key; did you mean {meant}\?$"):
        refuse_unknown(["problem=digits", override])


@pytest.mark.parametrize("override", ["nonsense=1", "evolution.foobar=1", "foo.bar=x"])
def test_a_key_like_no_other_is_told_where_keys_are_documented(override):
    with pytest.raises(ValueError, match=rf"^{override}: no such key; --cfg job shows all, de_ray/config\.py .*"):
        refuse_unknown([override])


@pytest.mark.parametrize("argument", [
    "evolution.targets.fc1=0.5", "evolution.targets={fc1:0.5}", "+evolution.targets.0=0.5", "sweep.space.seed=[1,2]",
    "sweep.space.evolution.sparsity=[0.5]", "~sweep.space.refit", "~evolution.targets=x", "+cluster=local",
    "+experiment=lenet5_mnist", "experiment=lenet5_mnist", "cluster.address=auto", "problem=digits", "pool=serial",
    "hydra.run.dir=x", "hydra/launcher=basic", "pool@pool=ray", "+nonsense=1", "problem.teacher.epochs=3", "seed=0,1",
    "problem.data.root='a=b'", "resume=x", "-m", "--multirun", "--config-dir=x", "--config-dir", "x"])
def test_what_hydra_takes_or_explains_itself_is_left_to_it(argument):
    refuse_unknown([argument])


def test_two_targets_of_size_are_refused():
    with pytest.raises(ValueError, match=r"target_ratio=40.*target_bytes=100"):
        compose(["target_ratio=40", "target_bytes=100"])


def test_a_custom_problem_says_what_it_needs():
    with pytest.raises(ValueError, match=r"problem\.model"):
        compose(["problem=custom"])
    given = ["problem=custom", "problem.model=a:b", "problem.calibration=c.npy"]
    compose([*given, "problem.teacher.checkpoint=d.safetensors"])
    with pytest.raises(ValueError, match=r"problem\.teacher=.*a checkpoint alone"):
        compose([*given, "problem.teacher.epochs=7"])


@pytest.mark.parametrize(("problem", "override"), [
    ("yolov3_tiny", "problem.teacher.checkpoint=a.safetensors"), ("yolov3", "problem.teacher.epochs=3"),
    ("ultralytics", "problem.teacher.batch=3"), ("yolov3_tiny", "problem.data.scenes=32"),
    ("fashion_scenes", "problem.data.root=coco"), ("fashion_scenes", "problem.data.unlabelled=[photographs]"),
    ("fashion_scenes", "problem.data.draw=objects"), ("yolov3_tiny", "problem.data.draw=some"),
    ("yolov3_tiny", "problem.data.mosaic=1.5"), ("yolov3_tiny", "problem.data.emphasis=-1"),
    ("yolov3_tiny", "problem.data.emphasis=inf"), ("lenet5_mnist", "problem.data.emphasis=1"),
])
def test_an_option_that_a_detector_would_not_read_is_refused(problem, override):
    with pytest.raises(ValueError, match="expected") as error:
        compose([f"problem={problem}", override])
    assert ".".join(override.split(".")[:2]) in str(error.value)


def test_an_architecture_of_ultralytics_takes_a_checkpoint():
    config = compose(["problem=ultralytics", "problem.weights=yolov8n.yaml", "problem.teacher.checkpoint=a.pt"])
    assert config.problem.teacher.checkpoint == "a.pt"


def test_every_field_is_documented():
    for name, group in vars(schema).items():
        if dataclasses.is_dataclass(group):
            lines = Path(schema.__file__).read_text().splitlines()
            start = lines.index(f"class {name}:")
            for field in dataclasses.fields(group):
                at = next(i for i in range(start, len(lines)) if lines[i].startswith(f"    {field.name}: "))
                assert lines[at + 1].startswith('    """'), f"{name}.{field.name} has no docstring"


def test_a_working_folder_that_cannot_be_written_to_is_told_before_hydra_stumbles_over_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse_unwritable([])
    writable = {str(tmp_path): False}
    monkeypatch.setattr(os, "access", lambda path, mode: writable.get(str(path), True))
    with pytest.raises(PermissionError, match=r"outputs cannot be written to.*hydra\.run\.dir"):
        refuse_unwritable(["seed=1"])
    with pytest.raises(PermissionError, match=r"multirun cannot be written to.*hydra\.sweep\.dir"):
        refuse_unwritable(["-m", "seed=1,2"])
    for arguments in (["hydra.run.dir=elsewhere"], ["++hydra.run.dir=elsewhere"], ["--help"], ["--cfg", "job"]):
        refuse_unwritable(arguments)
    (tmp_path / "outputs").mkdir()  # another file system's, say
    refuse_unwritable([])


@pytest.mark.parametrize(("arguments", "told"), [
    (["hydra.run.dir=afile"], r"afile cannot be written to: Not a directory; .* by hydra\.run\.dir=FOLDER"),
    (["seed=1", "++hydra.run.dir='afile/below'"], "afile/below cannot"), (['hydra.run.dir="afile"'], "afile cannot"),
    (["-m", "hydra.sweep.dir=afile/a/b"], r"afile/a/b cannot be written to: .* by hydra\.sweep\.dir=FOLDER"),
    (["hydra.run.dir=good", "hydra.run.dir=afile"], "afile cannot")])
def test_a_folder_for_a_run_that_cannot_be_made_is_one_error_that_names_it(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    with pytest.raises(PermissionError, match=told):
        refuse_unwritable(arguments)


def test_a_file_where_usual_runs_go_is_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs").touch()
    with pytest.raises(PermissionError, match=r"outputs cannot be written to: Not a directory; .*hydra\.run\.dir="):
        refuse_unwritable(["seed=1"])


@pytest.mark.parametrize("arguments", [
    ["hydra.run.dir=new/folder"], ["hydra.run.dir='my folder'"], ["hydra.run.dir=afile/${problem.name}"],
    ["hydra.sweep.dir=afile"], ["-m", "hydra.run.dir=afile"], ["hydra.run.dir=afile", "--cfg", "job"],
    ["hydra.verbose=true"], ["hydra.run.dir=afile", "hydra.run.dir=good"]])
def test_folders_that_can_be_made_or_are_not_asked_for_or_not_known_yet_pass(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    refuse_unwritable(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


def test_resuming_a_folder_without_a_run_says_what_to_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="outputs/"):
        resumed(Config(resume=str(tmp_path)), [])


@pytest.mark.parametrize("text", ["seed: [3\n", "hello\n", "- 3\n", "seed: -1\n", "sed: 1\n", "\0"])
def test_a_damaged_configuration_of_a_run_is_one_error_that_names_the_file(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read: "):
        resumed(Config(resume=str(tmp_path)), [])


def test_resuming_takes_no_other_overrides(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    assert resumed(Config(resume=str(tmp_path)), [f"resume={tmp_path}"])[0].seed == 3
    with pytest.raises(ValueError, match=r"leave out seed=4"):
        resumed(Config(resume=str(tmp_path)), [f"resume={tmp_path}", "seed=4"])
