"""Take up a run's place: the cluster, its nodes, the storage."""

from pathlib import Path

from de_ray.cluster.address import LOCAL, chosen
from de_ray.cluster.storage import Mirror
from de_ray.config import Config


def prepare(config: Config, folder: Path) -> Mirror:
    """Join the configured cluster and look whether it can do the run; returns the mirror of the run's folder.

    Ray on this machine alone is not started here: the pool does it once it is needed.

    Args:
        config: whole.
        folder: of the run; must exist.

    Raises:
        ValueError: nodes or the driver cannot reach what they need.
        OSError: the cluster or the storage cannot be reached.
    """
    mirror = Mirror(folder, config.cluster.storage)
    needed = config.pool.kind == "ray" or config.refit.workers > 1 or config.sweep is not None
    if needed and chosen(config.cluster.address) != LOCAL:
        # Ray takes seconds to import, and a serial pool must work without it.
        from de_ray.cluster.join import ensure_ray
        from de_ray.cluster.probe import require_ready

        ensure_ray(config.cluster.address)
        require_ready(config, folder)
    return mirror
