"""A run's folder: what another run may not do to it."""

import copy
import re

import pytest

from de_ray.checkpoint import FOLDER
from de_ray.config import Config, EvolutionConfig, PoolConfig, QuantizationConfig, RefitConfig
from de_ray.evaluation.members import EvaluationError
from de_ray.results import REPORT_FILE, STUDENT_FILE, require_own, save_config
from de_ray.schema import CONFIG_FILE
from de_ray.session import run_session
from tests.networks import mlp_problem


def configured(bits=4, sparsity=0.9):
    found = Config(evolution=EvolutionConfig(sparsity=sparsity, cycles=2, population=4, generations=1),
                   refit=RefitConfig(steps=5, final_steps=5), pool=PoolConfig(kind="serial"),
                   quantization=QuantizationConfig(bits=bits, refit_steps=5))
    found.problem.teacher.epochs = 2
    found.tracking.enabled = False
    return found


def test_the_folder_of_another_run_is_refused_before_anything_in_it_changes(tmp_path):
    config = configured()
    run_session(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    other = copy.deepcopy(config)
    other.quantization.bits = 2
    with pytest.raises(ValueError, match="holds another run, which has finished: quantization.bits=4 then, 2 now"):
        run_session(other, tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}


def test_a_run_with_checkpoints_may_be_quantized_otherwise_but_not_evolved_otherwise(tmp_path):
    problem = mlp_problem()
    save_config(configured(), tmp_path)
    require_own(problem, configured(sparsity=0.5), tmp_path)  # nothing to lose yet
    (tmp_path / FOLDER).mkdir()
    require_own(problem, configured(bits=2), tmp_path)
    with pytest.raises(ValueError, match="another run's: evolution.sparsity=0.9 then, 0.5 now"):
        require_own(problem, configured(sparsity=0.5), tmp_path)


def test_a_finished_run_may_be_taken_up_as_it_was_wherever_it_runs(tmp_path):
    save_config(configured(), tmp_path)
    (tmp_path / REPORT_FILE).write_text("{}")
    elsewhere = configured()
    elsewhere.pool.kind, elsewhere.device, elsewhere.resume = "ray", "cpu", str(tmp_path)
    require_own(mlp_problem(), elsewhere, tmp_path)


@pytest.mark.parametrize(("name", "text", "message"), [
    (STUDENT_FILE, "mine", r"student\.der is there, and no run that made it"),
    (CONFIG_FILE, "mine: true", r"(?s)config\.yaml cannot be read: .* start in a new folder")])
def test_files_of_somebody_else_are_not_replaced(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    config = configured()
    if name == STUDENT_FILE:
        config.start = str(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        run_session(config, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, text)]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("names", [[STUDENT_FILE, REPORT_FILE], [REPORT_FILE], ["figures/mine.png"],
                                   [STUDENT_FILE, f"{FOLDER}/step-0001.safetensors"]])
def test_results_beside_no_configuration_are_somebody_elses_whatever_else_is_there(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"mine": 1}')
    before, first = contents(tmp_path), re.escape(str(tmp_path / names[0].partition("/")[0]))
    with pytest.raises(ValueError, match=rf"^{first} is there, and no run that made it.* Start in a new folder$"):
        run_session(configured(), tmp_path)
    assert contents(tmp_path) == before


def test_the_folder_of_somebody_else_is_refused_before_a_teacher_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("de_ray.session.build_problem", lambda *_: pytest.fail("a teacher would be trained"))
    (tmp_path / REPORT_FILE).write_text("{}")
    with pytest.raises(ValueError, match="no run that made it"):
        run_session(configured(), tmp_path)


@pytest.mark.parametrize("minutes", [None, 0.05])
def test_the_same_command_runs_again_in_its_own_folder_to_the_same_file(minutes, tmp_path):
    config = configured()
    config.minutes = minutes
    first, again = (run_session(config, tmp_path / "run").data for _ in range(2))
    assert first == again == (tmp_path / "run" / STUDENT_FILE).read_bytes()


@pytest.mark.parametrize(("key", "value", "told"), [
    ("device", "cuda:99", r"^device='cuda:99': expected a GPU of this machine"),
    ("start", "damaged.der", r"^start='.*damaged\.der': .*; expected a compressed file of this teacher$"),
    ("start", "absent.der", r"^start='absent\.der': no such file; expected a compressed file of this teacher$")])
def test_a_device_or_a_start_that_cannot_be_had_is_refused_before_anything_is_made(
        key, value, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.der").write_bytes(b"no file of ours")
    monkeypatch.setattr("de_ray.session.build_problem", lambda *_: pytest.fail("a teacher would be trained"))
    config = configured()
    config.tracking.enabled = True
    setattr(config, key, value)
    with pytest.raises(ValueError, match=told):
        run_session(config, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.der"]


def test_a_size_that_no_file_can_have_is_refused_before_anything_is_tracked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configured()
    config.tracking.enabled, config.target_bytes = True, 60
    with pytest.raises(ValueError, match="target_bytes=60 allows 60 bytes: expected more than about"):
        run_session(config, tmp_path / "run")
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("error", [EvaluationError("no replica is left"), ConnectionError("a worker of refit failed")])
def test_a_run_that_has_lost_its_replicas_or_workers_says_where_it_continues(error, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise error

    monkeypatch.setattr("de_ray.session.run", fail)
    with pytest.raises(type(error)):
        run_session(configured(), tmp_path / "run")
    assert f"stopped; continue with: python launch.py resume={tmp_path / 'run'}" in caplog.text


def test_a_damaged_report_is_one_error_that_names_the_file(tmp_path):
    save_config(configured(), tmp_path)
    (tmp_path / REPORT_FILE).write_text('{"sparsity": 0.9')
    with pytest.raises(ValueError, match=r"report\.json cannot be read: .*Removed, it is written again"):
        require_own(mlp_problem(), configured(), tmp_path)


def test_a_figure_that_cannot_be_drawn_loses_neither_file_nor_report(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no such glyph")

    monkeypatch.setattr("de_ray.results.draw_all", fail)
    run_session(configured(), tmp_path / "run")
    assert (tmp_path / "run" / REPORT_FILE).is_file() and (tmp_path / "run" / "student.der").is_file()
    assert "no such glyph" in caplog.text
