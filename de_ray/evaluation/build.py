"""Choose a pool by configuration."""

from de_ray.config import PoolConfig
from de_ray.evaluation.pool import Pool, SerialPool
from de_ray.evaluation.replica import ReplicaSetup
from de_ray.problem.base import Problem
from de_ray.student import Student


def build_pool(problem: Problem, config: PoolConfig, student: Student, device: str = "cpu") -> Pool:
    """A pool whose replicas hold the teacher; call `load` when the student differs from it.

    Args:
        problem: gives the teacher, the calibration inputs and the divergence.
        config: kind and size of the pool.
        student: the driver's, which replicas follow.
        device: of a serial pool's replica; Ray gives actors theirs.
    """
    setup = ReplicaSetup(problem, config.batch, device, config.threads, config.cache_mb,
                         config.screen_precision)
    if config.kind == "serial":
        return SerialPool(setup, config.stack)
    # Ray takes seconds to import, and a serial pool must work without it.
    from de_ray.evaluation.ray_pool import RayPool

    return RayPool(setup, config, student)
