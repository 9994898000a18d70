"""What decides a run's result, by which checkpoints and schedules that are kept know their own."""

import hashlib
import re
from dataclasses import asdict

from torch import Tensor

from de_ray.config import Config
from de_ray.problem.base import Problem


def fingerprint(problem: Problem, config: Config) -> dict:
    """What decides a run's result, for checkpoints: where and how fast it runs is left out."""
    fields = asdict(config)
    irrelevant = {"pool": ("kind", "actors", "gpus", "autoscale", "task_seconds")}
    if config.target_bytes is None and config.target_ratio is None and not config.evolution.rate_weight:
        # Nothing of it matters before its stage, but for what refit takes for no harm.
        irrelevant["quantization"] = tuple(key for key in fields["quantization"] if key != "negligible")
    for group, keys in irrelevant.items():
        for key in keys:
            del fields[group][key]
    for key in ("resume", "tracking", "cluster", "device", "sweep", "minutes"):
        del fields[key]
    del fields["problem"]["data"]["workers"]
    digest = hashlib.sha256()  # of bytes: a sum would depend on the processor
    for value in problem.teacher.state_dict().values():
        if isinstance(value, Tensor) and value.is_floating_point():  # buffers that count passes are none
            digest.update(value.detach().cpu().contiguous().numpy())
    if config.problem.calibration is not None:  # the file may have been replaced; images are decoded, which may differ
        digest.update(problem.inputs.contiguous().numpy())
    digest.update(problem.sources.encode())
    # What else a network is, a `.cfg` that was edited for one; addresses differ from process to process.
    digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(problem.teacher)).encode())
    fields["teacher_digest"] = digest.hexdigest()
    return fields
