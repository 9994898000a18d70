"""Which Ray a run belongs to."""

import os

LOCAL = "local"


def chosen(configured: str | None) -> str:
    """`cluster.address`, or RAY_ADDRESS where that is not set; local where neither is: see `ClusterConfig.address`."""
    return configured or os.environ.get("RAY_ADDRESS") or LOCAL
