"""Ray clusters of several nodes on this machine."""

import contextlib
from collections.abc import Iterator
from functools import partial

import ray
from ray.cluster_utils import Cluster

from tests.warm import warm_workers

UNHEARD = {"include_log_monitor": False}
"""No process that reads a node's logs: it takes a second of processor time to start."""


def local_session(**options: object) -> None:
    """Start Ray for this process alone: by default it would join whatever cluster another process has started."""
    with warm_workers():
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)


def shared_session() -> None:
    """Have the session that modules share, with room for the actors of several pools. It takes seconds to start."""
    if not ray.is_initialized():
        local_session(num_cpus=6)


@contextlib.contextmanager
def head_alone(**options: object) -> Iterator[Cluster]:
    """A cluster of one node with no CPU, where the driver is; it notices within a second when a node has gone."""
    with warm_workers():
        nodes = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "include_dashboard": False, "no_monitor": True, **UNHEARD, **options,
            "_system_config": {"health_check_period_ms": 300, "health_check_failure_threshold": 3,
                               "health_check_initial_delay_ms": 0}})
        nodes.connect()
        nodes.add_node = partial(nodes.add_node, **UNHEARD)
        try:
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()
