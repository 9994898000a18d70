"""Reports and figures as people see them."""

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from de_ray.codec.container import FileSummary, TensorSummary
from de_ray.figures import draw_all
from de_ray.report import print_file_summary, print_report, versions, write_json


def report(layers=3):
    history = [{"cycle": i + 1, "sparsity": 0.1 * i, "divergence": 0.01 / (i + 1),
                "candidate_divergence": 0.02 if i < 5 else None} for i in range(8)]
    trials = [{"widths": [w] * layers, "bytes": 100 * w, "divergence": 1 / w} for w in range(1, 5)]
    return {"problem": "digits", "method": "directed", "seed": 3, "parameters": 1000, "sparsity": 0.912,
            "file_bytes": 80, "ratio": 50.0, "bits_per_survivor": 5.5,
            "divergence": {"calibration": 0.001, "held_out": 0.0042},
            "teacher": {"accuracy": 98.5}, "student": {"accuracy": 98.25}, "decoded": {"accuracy": 98.25},
            "decoded_equals_student": True, "evaluations": 1234, "seconds": {"evolve": 7.25, "quantize": 1.0},
            "history": history, "trials": trials, "chosen": trials[1],
            "layers": [{"name": f"layer{i}", "weights": 300 * (i + 1), "density": 0.1 / (i + 1), "bits": i % 8 + 1,
                        "bytes": 20.4} for i in range(layers)]}


def test_the_table_shows_teacher_student_and_file_side_by_side(tmp_path):
    console = Console(file=io.StringIO(), width=110)
    print_report(report(), [tmp_path / "student.der"], console)
    text = console.file.getvalue()
    for expected in ("teacher", "student", "decoded file", "98.50", "98.25", "0.0042", "91.20%", "4,000", "50.0x",
                     "layer2", str(tmp_path / "student.der")):
        assert expected in text


def test_what_was_written_below_the_working_folder_is_named_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO(), width=110)
    print_report(report(), [tmp_path / "run/student.der"], console)
    assert "wrote run/student.der\n" in console.file.getvalue()


def test_a_layer_without_survivors_and_the_totals_are_in_the_table():
    console = Console(file=io.StringIO(), width=110)
    given = report()
    given["layers"][1] |= {"density": 0.0, "bits": 0, "bytes": 0}
    print_report(given, [], console)
    text = console.file.getvalue()
    assert "0.00%" in text and "all layers" in text and "1,800" in text  # 300 + 600 + 900 weights
    assert "1,234 evaluations, 8.2 s: evolve 7.2 s, quantize 1.0 s" in text


def test_a_file_that_is_not_the_student_is_told(tmp_path):
    console = Console(file=io.StringIO(), width=110)
    print_report(report() | {"decoded_equals_student": False}, [], console)
    assert "NO" in console.file.getvalue()


def test_names_and_paths_with_brackets_are_told_as_they_are(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    given = report() | {"problem": "custom[a]", "teacher": {"top[5]": 1}, "student": {"top[5]": 1},
                        "decoded": {"top[5]": 1}}
    given["layers"][0]["name"] = "blocks[/0].fc"
    path = tmp_path / "criteria=[obs]" / "student.der"
    print_report(given, [path], console)
    print_file_summary("[/x].der", FileSummary("net[b]", 100, 10, (TensorSummary("[red]w", (3, 4), 12, 0.5, 4, 5.0),)),
                       console)
    text = console.file.getvalue()
    for expected in ("custom[a]", "top[5]", "blocks[/0].fc", str(path), "[/x].der (net[b])", "[red]w"):
        assert expected in text


def test_a_files_summary_ends_with_its_totals_and_ratio():
    console = Console(file=io.StringIO(), width=110)
    print_file_summary("a.der", FileSummary("", 1500, 300, (
        TensorSummary("fc.weight", (10, 90), 900, 0.25, 15, 1100.0),
        TensorSummary("fc.bias", (600,), 600, 0, 0, 100.0))), console)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()
            if line.startswith("│")]
    assert rows == [["fc.weight", "10 x 90", "900", "25.00%", "15", "4", "1,100"],
                    ["fc.bias", "600", "600", "0.00%", "0", "0", "100"],
                    ["container", "", "", "", "", "", "300"], ["total", "", "1,500", "", "", "", "1,500"]]
    assert "ratio 4.0x" in console.file.getvalue()


def test_where_there_is_no_terminal_the_report_is_plain_text(capsys):
    print_report(report(75), [])
    text = capsys.readouterr().out
    assert "layer74" in text and "\x1b" not in text


def test_a_report_is_valid_json_even_with_nan_and_numpy_scalars(tmp_path):
    write_json(tmp_path / "report.json", {"a": float("nan"), "b": [1.5, {"c": float("inf")}], "d": (1, "x"),
                                          "e": np.int64(3), "f": np.float32("nan"), "g": np.bool_(True)})
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "a": None, "b": [1.5, {"c": None}], "d": [1, "x"], "e": 3, "f": None, "g": True}


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_json(tmp_path / "report.json", {"run": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"run": object()})

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "report.json", {"run": 2})
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{\n  "run": 1\n}\n']


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
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique((255 * pixels[..., :3]).astype(np.int64) @ [65536, 256, 1])) > 50  # colours: no blank page


def test_figures_leave_out_what_a_logarithmic_axis_cannot_show(tmp_path):
    given = report()
    given["trials"][0]["divergence"] = float("inf")
    given["trials"][3]["divergence"] = None  # as read back from JSON
    given["layers"][0]["density"] = 0.0
    for record in given["history"]:
        record |= {"divergence": 0.0, "candidate_divergence": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(draw_all(tmp_path, given, {"fc": (np.ones(1), np.ones(1))})) == 4


def test_figures_leave_no_trace_in_the_process(tmp_path):
    code = ("import sys, numpy; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
            "from tests.unit.test_report import draw_all, report\n"
            "draw_all(Path(sys.argv[2]), report(), {'fc': (numpy.ones(3), None)})\n"
            "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parents[2]), str(tmp_path)], check=True)


def test_a_fixed_width_has_no_front_to_draw(tmp_path):
    one = report() | {"trials": report()["trials"][:1]}
    assert "pareto.png" not in {path.name for path in draw_all(tmp_path, one, {"fc": (np.ones(3), None)})}
