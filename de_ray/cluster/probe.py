"""Before a run starts: does every node have what its processes will need?

Replicas get the student, the calibration inputs and the divergence through Ray's object store, so that data sets,
teachers and checkpoints need to be on the driver's node alone. What every node needs is the same software, the module
of a user's own model (it is pickled by name), and the folder of Tune's records, where a trial writes wherever it runs.
"""

import importlib.util
import logging
import secrets
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from de_ray.cluster.storage import location, open_storage
from de_ray.config import Config
from de_ray.report import versions

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Patience with a node's first process."""
SOFTWARE = ("de-ray", "torch", "numpy", "ray")
"""Packages whose versions must be equal: the result may depend on them."""


def require_ready(config: Config, folder: Path) -> None:
    """Look at the storage from here, and at the cluster's nodes where there are several.

    Nodes that join later are not looked at; they should come from the same image.

    Args:
        config: whole.
        folder: of the run.

    Raises:
        ValueError: naming the nodes and what they lack.
    """
    nodes = _nodes()
    place = shared_folder(config, folder)
    if config.cluster.storage is None and len(nodes) > 1:
        log.warning("cluster.storage is not set: checkpoints stay on this node and go with it")
    if place is None or config.cluster.storage is None and len(nodes) == 1:
        marker = None
    else:
        marker = f".de-ray-{secrets.token_hex(8)}"
        _write(place, marker)
    try:
        if len(nodes) > 1:
            _require_all(nodes, place, marker, config.problem.model)
    finally:
        if marker is not None:
            filesystem, root = open_storage(place)
            filesystem.rm_file(f"{root}/{marker}")


def shared_folder(config: Config, folder: Path) -> str | None:
    """What all nodes must reach: the run's part of the storage, or its own folder where Tune writes to that.

    None: nothing, since nothing but replicas runs on other nodes.
    """
    if config.cluster.storage is not None:
        return location(config.cluster.storage, folder)
    return str(folder.absolute()) if config.quantization.bits is None else None


def _nodes() -> dict[str, str]:
    """Address by id, of the nodes that live."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _write(place: str, marker: str) -> None:
    try:
        filesystem, root = open_storage(place)
        filesystem.makedirs(root, exist_ok=True)
        # Its own name is what it holds: another disk at the same path has no such file.
        filesystem.pipe_file(f"{root}/{marker}", marker.encode())
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001, whatever a store's client may raise
        raise ValueError(f"{place}: the driver's node cannot write there ({type(error).__name__}: {error}); check "
                         "cluster.storage, and what this machine's role may do") from error


def _require_all(nodes: dict[str, str], place: str | None, marker: str | None, model: str | None) -> None:
    """Ask every node at once; raise `ValueError` with all that they lack."""
    module = model.partition(":")[0] if model else None
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    calls = {node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
        versions(), place, marker, module) for node in nodes}
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=START_SECONDS)
    faults = []
    for node, call in calls.items():
        try:
            found = ray.get(call, timeout=0.1)
        except RayTaskError as error:  # de_ray itself could not be imported
            found = [str(error).strip().splitlines()[-1]]
        except RayError as error:
            if node not in _nodes():
                continue  # it has left meanwhile, as nodes do
            found = [f"no answer within {START_SECONDS:g} s ({type(error).__name__})"]
        faults += [f"node {nodes[node]} ({node[:8]}): {fault}" for fault in found]
    if faults:
        raise ValueError("; ".join(faults) + ". All nodes need the driver's packages, and a folder that they share: "
                         "set cluster.storage=s3://... or to such a folder")


def _look(expected: dict[str, str], place: str | None, marker: str | None, module: str | None) -> list[str]:
    """What the node that this runs on lacks."""
    faults = [f"{name} is {have.get(name)} there and {expected[name]} here" for have in [versions()]
              for name in SOFTWARE if name in expected and have.get(name) != expected[name]]
    if module is not None and importlib.util.find_spec(module.partition(".")[0]) is None:
        faults.append(f"no module {module!r} there, which problem.model names; cluster.submit=true ships the working "
                      "folder, or put it into the image")
    if place is not None and marker is not None:
        try:
            filesystem, root = open_storage(place)
            if filesystem.cat_file(f"{root}/{marker}") != marker.encode():
                raise FileNotFoundError(marker)
        except FileNotFoundError:
            faults.append(f"{place} is not the driver's folder there")
        except Exception as error:  # noqa: BLE001, whatever a store's client may raise
            faults.append(f"{place} cannot be read there ({type(error).__name__}: {error})")
    return faults
