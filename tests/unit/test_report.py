"""Reports, figures and progress as people see them."""

import io
import json
import logging

import numpy as np
import pytest
from rich.console import Console

from de_ray.figures import draw_all
from de_ray.progress import Progress
from de_ray.report import print_report, versions, write_json


def report(layers=3):
    history = [{"cycle": i + 1, "sparsity": 0.1 * i, "divergence": 0.01 / (i + 1),
                "candidate_divergence": 0.02 if i < 5 else None} for i in range(8)]
    trials = [{"widths": [w] * layers, "bytes": 100 * w, "divergence": 1 / w} for w in range(1, 5)]
    return {"problem": "digits", "method": "directed", "seed": 3, "parameters": 1000, "sparsity": 0.912, "file_bytes": 80,
            "ratio": 50.0, "bits_per_survivor": 5.5, "divergence": {"calibration": 0.001, "held_out": 0.0042},
            "teacher": {"accuracy": 98.5}, "student": {"accuracy": 98.25}, "decoded": {"accuracy": 98.25},
            "decoded_equals_student": True, "history": history, "trials": trials, "chosen": trials[1],
            "layers": [{"name": f"layer{i}", "weights": 300 * (i + 1), "density": 0.1 / (i + 1), "bits": i % 8 + 1,
                        "bytes": 20.4} for i in range(layers)]}


def test_the_table_shows_teacher_student_and_file_side_by_side(tmp_path):
    console = Console(file=io.StringIO(), width=110)
    print_report(report(), [tmp_path / "student.der"], console)
    text = console.file.getvalue()
    for expected in ("teacher", "student", "decoded file", "98.50", "98.25", "0.0042", "91.20%", "4,000", "50.0x",
                     "layer2", str(tmp_path / "student.der")):
        assert expected in text


def test_a_report_is_valid_json_even_with_nan(tmp_path):
    write_json(tmp_path / "report.json", {"a": float("nan"), "b": [1.5, {"c": float("inf")}], "d": (1, "x")})
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": None, "b": [1.5, {"c": None}], "d": [1, "x"]}


def test_versions_name_what_a_result_depends_on():
    assert {"python", "de-ray", "torch", "numpy", "ray"} <= versions().keys()
    assert "not installed" not in versions().values()


@pytest.mark.parametrize("layers", [1, 3, 75])
def test_figures_are_drawn_for_few_and_for_many_layers(tmp_path, layers):
    rng = np.random.default_rng(0)
    survivors = {f"layer{i}": (rng.normal(size=30 * (i + 1)), np.array([-1.0, 1.0])) for i in range(layers)}
    survivors["layer0"] = (np.empty(0), np.empty(0))
    paths = draw_all(tmp_path / "figures", report(layers), survivors)
    assert {path.name for path in paths} == {"course.png", "layers.png", "levels.png", "pareto.png"}
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 8000


def test_a_fixed_width_has_no_front_to_draw(tmp_path):
    one = report() | {"trials": report()["trials"][:1]}
    assert "pareto.png" not in {path.name for path in draw_all(tmp_path, one, {"fc": (np.ones(3), None)})}


def test_progress_is_a_line_of_log_a_step_where_there_is_no_terminal(caplog):
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO(), force_terminal=False)
    with Progress(console) as progress:
        progress.stage("evolve")
        progress.update(3, 20, "sparsity 40 %")
    assert "evolve 3/20: sparsity 40 %" in caplog.text
    assert console.file.getvalue() == ""


def test_progress_shows_rate_and_time_left_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with Progress(console) as progress:
        progress.stage("evolve")
        progress.update(3, 20, "sparsity 40 %")
        progress.stage("quantize")
    text = console.file.getvalue()
    assert "evolve" in text and "3/20" in text and "/s" in text and "quantize" in text
