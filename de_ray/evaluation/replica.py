"""A resident student on one device, which evaluates candidates against the teacher."""

import copy
import logging
import resource
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from de_ray.device import moved, products, resolve_device, threads, warn_of_precision
from de_ray.evaluation.capture import CaptureError, capture
from de_ray.evaluation.chunks import by_layers
from de_ray.evaluation.edits import Edit
from de_ray.evaluation.engine import Engine
from de_ray.evaluation.full import FullForwards
from de_ray.evaluation.hidden import Group, hidden_groups
from de_ray.evolution.candidate import Candidate
from de_ray.problem.base import Divergence, Layer, Problem
from de_ray.problem.divergence import TensorDivergence
from de_ray.student import Student

log = logging.getLogger(__name__)

PACKAGE = __name__.partition(".")[0]
"""Name of the logger of all of its modules."""
KILOBYTES = 1 if sys.platform == "linux" else 1024
"""Unit of `ru_maxrss`: kilobytes, and bytes on macOS."""


class ReplicaSetup:
    """What a replica is built from, without the inputs that only the driver needs; travels to actors once."""

    def __init__(self, problem: Problem, batch: int, device: str, thread_count: int, cache_mb: int = 1024,
                 screen_precision: str = "float32") -> None:
        self.teacher: nn.Module = problem.teacher
        self.layers: tuple[Layer, ...] = problem.layers
        self.batches: tuple[Tensor, ...] = problem.calibration.split(batch)
        self.divergence: Divergence = problem.divergence
        self.device = device
        self.threads = thread_count
        self.cache_mb = cache_mb
        self.screen_precision = screen_precision

    def for_device(self, device: str) -> "ReplicaSetup":
        """The same for replicas in other processes, on a device of theirs.

        The teacher travels on the CPU: they may have no GPU, or know theirs by another number. Batches are tensors of
        their own: a part of one travels with all of it.
        """
        setup = copy.copy(self)
        setup.device = device
        setup.teacher = copy.deepcopy(self.teacher).to("cpu")
        setup.batches = tuple(batch.clone() for batch in self.batches)
        return setup


class _Listener(logging.Handler):
    """Keeps the texts of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self.texts.append(record.getMessage())


class Replica:
    """A student with the calibration batches and the teacher's outputs on them.

    A network that cannot be run in parts is evaluated by full forward passes, with a warning that names it.
    """

    def __init__(self, setup: ReplicaSetup) -> None:
        listener = _Listener()
        logging.getLogger(PACKAGE).addHandler(listener)
        try:
            self._build(setup)
        finally:
            logging.getLogger(PACKAGE).removeHandler(listener)
        self._warnings = listener.texts

    def _build(self, setup: ReplicaSetup) -> None:
        self.device = resolve_device(setup.device)
        self.threads = setup.threads
        self.divergence = setup.divergence
        self._screen_precision = setup.screen_precision
        warn_of_precision("pool.screen_precision", setup.screen_precision, self.device)
        self.student = Student(setup.teacher, setup.layers, self.device)
        self.batches = [moved(batch, self.device) for batch in setup.batches]
        self._hidden: list[Group] = []
        with threads(self.threads), products("float32", self.device), torch.inference_mode():
            self._runner = self._build_runner(setup.cache_mb)
            # The student is still the teacher here, so that no second network is needed.
            self.teacher_outputs = [self._unchanged(b) for b in range(len(self.batches))]
            self._references = [self.divergence.against(output) if isinstance(self.divergence, TensorDivergence)
                                else None for output in self.teacher_outputs]

    def _build_runner(self, cache_mb: int) -> Engine | FullForwards:
        try:
            program = capture(self.student.module, self.batches[0])
        except CaptureError as error:
            log.warning("%s is evaluated by full forward passes, which is slower: %s",
                        type(self.student.module).__name__, error)
            return FullForwards(self.student, self.batches)
        try:
            self._hidden = hidden_groups(program, self.student.module.state_dict(keep_vars=True))
        except Exception as error:  # noqa: BLE001 - any graph may come here, and the file alone is larger without
            log.warning("hidden units keep their numbers, as they could not be followed through the network: %s: %s",
                        type(error).__name__, error)
        return Engine(program, self.student, self.batches, cache_mb)

    def warnings(self) -> list[str]:
        """What it warned of while it was built, for the driver: nobody sees the logs of other processes."""
        return self._warnings

    def hidden(self) -> list[Group]:
        """The network's hidden units; none where it cannot be run in parts."""
        return self._hidden

    def _unchanged(self, batch: int) -> object:
        ((_, output),) = self._runner.outputs([self._runner.changes(())], batch, "float32")
        # Cached activations may be dropped; the teacher's outputs stay.
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), output)

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int],
                 screening: bool = False) -> np.ndarray:
        """Mean divergence of each candidate over the named calibration batches.

        Args:
            candidates: K candidates; those of the same layers share passes. The student stays as it is.
            batches: indices of calibration batches.
            screening: whether `pool.screen_precision` will do.

        Returns:
            float64 [K]; non-finite where a candidate's divergence is.
        """
        totals = np.zeros(len(candidates))
        with threads(self.threads), products("float32", self.device), torch.inference_mode():
            for group in by_layers(candidates):
                self._runner.next_call()
                changes = [self._runner.changes(candidates[k]) for k in group]
                for b in batches:
                    totals[group] += np.fromiter(self._divergences(changes, b, screening), np.float64, len(group))
        return totals / sum(len(self.batches[b]) for b in batches)

    def _divergences(self, changes: Sequence, batch: int, screening: bool) -> Iterator[float]:
        """Summed over a batch's samples, candidate by candidate."""
        for count, output in self._runner.outputs(changes, batch, self._screen_precision if screening else "float32"):
            reference, teacher = self._references[batch], self.teacher_outputs[batch]
            if reference is None and count > 1:
                teacher = pytree.tree_map_only(Tensor, lambda one, k=count: torch.cat([one] * k), teacher)
            divergence = self.divergence(teacher, output) if reference is None else reference(output)  # [k * N]
            yield from divergence.double().reshape(count, -1).sum(1).tolist()

    def commit(self, candidate: Candidate) -> None:
        """Carry out a candidate for good."""
        self.student.commit(candidate)
        self._runner.committed(candidate)

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Take over refitted survivors; see `Student.values`."""
        self.student.set_values(values)
        self._runner.refitted()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a whole student; see `Student.state`."""
        self.student.load_state(state)
        self._runner.refitted()

    def peak_mb(self) -> float:
        """Most resident memory that this process has had, in megabytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / KILOBYTES
