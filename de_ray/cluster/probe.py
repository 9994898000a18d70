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

from de_ray.checks import last_line
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
    if config.cluster.storage is None and len(nodes) > 1:
        log.warning("cluster.storage is not set: checkpoints stay on this node and go with it")
    alone = config.cluster.storage is None and len(nodes) == 1
    marker, written = f".de-ray-{secrets.token_hex(8)}", []
    try:
        for place in [] if alone else shared_folders(config, folder):
            _write(place, marker)
            written.append(place)
        if len(nodes) > 1:
            _require_all(nodes, written, marker, config)
    finally:
        for place in written:
            filesystem, root = open_storage(place)
            filesystem.rm_file(f"{root}/{marker}")


def shared_folders(config: Config, folder: Path) -> list[str]:
    """What all nodes must reach: the run's part of the storage, and its own folder where they write to that.

    A sweep's trials write there wherever they run, Tune's records of widths only where there is no storage. None where
    nothing but replicas runs on other nodes.
    """
    storage = config.cluster.storage
    places = [] if storage is None else [location(storage, folder)]
    if config.sweep is not None or storage is None and config.quantization.bits is None:
        places.append(str(folder.absolute()))
    return places


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


def _require_all(nodes: dict[str, str], places: list[str], marker: str, config: Config) -> None:
    """Ask every node at once; raise `ValueError` with all that they lack."""
    model = config.problem.model
    module = model.partition(":")[0] if model else None
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    calls = {node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
        versions(), places, marker, module) for node in nodes}
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=START_SECONDS)
    faults = []
    for node, call in calls.items():
        try:
            found = ray.get(call, timeout=0.1)
        except RayTaskError as error:  # de_ray itself could not be imported
            found = [last_line(error)]
        except RayError as error:
            if node not in _nodes():
                continue  # it has left meanwhile, as nodes do
            found = [f"no answer within {START_SECONDS:g} s ({type(error).__name__})"]
        faults += [f"node {nodes[node]} ({node[:8]}): {fault}" for fault in found]
    if faults:
        way = "set cluster.storage=s3://... or to such a folder" if config.sweep is None else \
            "start the sweep in one, since its trials write there (hydra.run.dir=...)"
        raise ValueError("; ".join(faults) + f". All nodes need the driver's packages, and a folder that they share: "
                         f"{way}")


def _look(expected: dict[str, str], places: list[str], marker: str, module: str | None) -> list[str]:
    """What the node that this runs on lacks."""
    faults = [f"{name} is {have.get(name)} there and {expected[name]} here" for have in [versions()]
              for name in SOFTWARE if name in expected and have.get(name) != expected[name]]
    if module is not None and importlib.util.find_spec(module.partition(".")[0]) is None:
        faults.append(f"no module {module!r} there, which problem.model names; cluster.submit=true ships the working "
                      "folder, or put it into the image")
    for place in places:
        try:
            filesystem, root = open_storage(place)
            if filesystem.cat_file(f"{root}/{marker}") != marker.encode():
                raise FileNotFoundError(marker)
        except FileNotFoundError:
            faults.append(f"{place} is not the driver's folder there")
        except Exception as error:  # noqa: BLE001, whatever a store's client may raise
            faults.append(f"{place} cannot be read there ({type(error).__name__}: {error})")
    return faults
