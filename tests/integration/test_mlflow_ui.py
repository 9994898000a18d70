"""Two runs in MLflow's own pages, served by `mlflow ui` and looked at by a headless Chromium.

`DE_RAY_SCREENSHOTS=docs/images pytest tests/integration/test_mlflow_ui.py` makes the pictures of docs/ again.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from de_ray.schema import compose
from de_ray.session import run_session

QUICK = ["pool=serial", "evolution.cycles=3", "evolution.population=4", "evolution.generations=1", "refit.steps=20",
         "refit.final_steps=40", "quantization.refit_steps=20", "quantization.bits=4", "problem.teacher.epochs=10"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser():
    """A headless browser; without one the module's tests are skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as started:
        if path is None and not Path(started.chromium.executable_path).exists():
            pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)}, and playwright has not installed its own")
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = started.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder with two tracked runs."""
    folder = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DE_RAY_CACHE", str(folder / "cache"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        for name, sparsity in (("first", 0.6), ("second", 0.9)):
            run_session(compose([*QUICK, f"evolution.sparsity={sparsity}"]), folder / name)
    return folder


@pytest.fixture(scope="module")
def server(work):
    """The address of `mlflow ui` on the runs' store; on the loopback interface, as is its default."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri",
                                f"sqlite:///{work}/mlflow.db", "--port", str(port), "--workers", "1"], cwd=work,
                               env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true",
                                                 "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, 15)  # it has workers
        process.wait(30)


@pytest.fixture
def page(browser):
    """An empty page of the size of the pictures."""
    opened = browser.new_page(viewport={"width": 1400, "height": 800})
    opened.set_default_timeout(90_000)
    yield opened
    opened.close()


def runs(work):
    client = MlflowClient(f"sqlite:///{work}/mlflow.db")
    experiment = client.get_experiment_by_name("de-ray digits").experiment_id
    found = client.search_runs([experiment])
    return experiment, [run for run in found if "mlflow.parentRunId" not in run.data.tags]


def keep(page, name, metrics=()):
    """Save a picture where the environment asks for it, with more metrics in the plot of a comparison."""
    folder = os.environ.get("DE_RAY_SCREENSHOTS")
    if not folder:
        return
    close = page.get_by_role("button", name="Close")  # of an assistant's panel
    if close.count():
        close.first.click()
    if metrics:
        page.get_by_role("combobox").nth(1).click(force=True)
        for metric in metrics:
            page.locator(f"[title='{metric}']").last.click()
        page.get_by_text("Run details").click()
        page.get_by_text("Run details").click()
        page.wait_for_timeout(1000)
    Path(folder).mkdir(parents=True, exist_ok=True)
    page.screenshot(path=Path(folder) / f"{name}.png")


def test_two_runs_are_compared_by_parallel_coordinates(page, server, work):
    experiment, found = runs(work)
    query = urllib.parse.urlencode({"runs": json.dumps([run.info.run_id for run in found]),
                                    "experiments": json.dumps([experiment])})
    page.goto(f"{server}/#/compare-runs?{query}")
    page.wait_for_selector(".js-plotly-plot .parcoords", state="attached")
    text = page.inner_text("body")
    assert all(run.info.run_name in text for run in found)
    keep(page, "mlflow-compare", ("divergence", "ratio"))


def test_a_runs_page_shows_its_command_its_metrics_and_its_layers(page, server, work):
    experiment, found = runs(work)
    page.goto(f"{server}/#/experiments/{experiment}/runs/{found[0].info.run_id}")
    page.wait_for_selector("text=student_accuracy")
    text = page.inner_text("body")
    assert found[0].info.run_name in text and "python launch.py problem=digits" in text
    keep(page, "mlflow-run")
