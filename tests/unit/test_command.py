"""The command line of a configuration gives it again; credentials are in none."""

import dataclasses
import logging
import shlex

import pytest

from de_ray.command import command_line
from de_ray.config import SweepConfig, TrackingConfig
from de_ray.redact import redact_logs, scrub, without_credentials
from de_ray.schema import compose, refuse_unknown


@pytest.mark.parametrize("overrides", [
    [], ["evolution=fisher", "seed=3", "device=cpu"], ["+evolution.targets={fc*:0.5,fc1:0.25}"],
    ["+evolution.targets.0=0.5", "+evolution.targets.12=0.25", "+evolution.targets={fc*:0.5}"],
    ["problem=lenet5_mnist", "quantization.bits=4", "refit.learning_rate=1e-5"],
    ["problem=custom", "problem.model=a.b:c", "problem.calibration='my folder/x y.npy'", "quantization.bits=null"],
    ["problem.include=['1','null','x,y','$','fc?']", "problem.exclude=[]"],
    ["problem.teacher.checkpoint='it\\'s = {x}'"], ["problem.teacher.checkpoint='a\\\\'"],
    ["+experiment=lenet300_mnist"],
])
def test_a_command_line_composes_to_the_configuration_that_it_came_from(overrides):
    config = compose(overrides)
    python, script, *words = shlex.split(command_line(config))
    assert (python, script) == ("python", "launch.py")
    assert compose(words) == config
    refuse_unknown(words)


def test_a_command_line_tells_what_is_done_and_neither_where_it_is_tracked_nor_the_sweep():
    config = dataclasses.replace(compose(["evolution.sparsity=0.8"]), sweep=SweepConfig(space={"seed": [1]}),
                                 tracking=TrackingConfig(uri="http://user:hunter2@host"))
    assert command_line(config) == "python launch.py problem=digits evolution.sparsity=0.8"


@pytest.mark.parametrize(("text", "told"), [
    ("AWS_SECRET_ACCESS_KEY=hunter2 x", "AWS_SECRET_ACCESS_KEY=... x"), ("?api_key=hunter2&a=1", "?api_key=...&a=1"),
    ("X-Amz-Signature=hunter2", "X-Amz-Signature=..."), ("tokens: 5, key=value", "tokens: 5, key=value")])
def test_keys_that_name_a_secret_lose_their_value(text, told):
    assert without_credentials(text) == told


def test_texts_are_scrubbed_wherever_they_are_nested():
    assert scrub({"a": ["http://u:hunter2@h", 3], "b": ({"c": "x"},)}) == {"a": ["http://h", 3], "b": ({"c": "x"},)}


def test_any_logger_of_the_process_is_redacted_once_and_malformed_calls_are_left_to_logging(caplog):
    factory = logging.getLogRecordFactory()
    try:
        redact_logs()
        first = logging.getLogRecordFactory()
        redact_logs()
        assert logging.getLogRecordFactory() is first is not factory
        logging.getLogger("some.library").error("cannot reach %s, %d times", "http://user:hunter2@host/x", 3)
        assert caplog.messages == ["cannot reach http://host/x, 3 times"]
        assert first("n", 30, "p", 1, "%d", ("x",), None).args == ("x",)
    finally:
        logging.setLogRecordFactory(factory)
