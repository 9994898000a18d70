"""The recipes in docker/, checked by what will read them: hadolint, Ray's schema, Ray's AWS code against moto, bash."""

import configparser
import copy
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"


def stages():
    """Instructions by stage, in order: name -> (base, lines)."""
    found = {}
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    for line in text.splitlines():
        start = re.fullmatch(r"FROM (\S+) AS (\S+)", line)
        if start:
            lines = found.setdefault(start[2], (start[1], []))[1]
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


def final(target):
    """All instructions that make a target, its bases' first; what COPY --from brings is not among them."""
    base, lines = stages()[target]
    return (final(base) if base in stages() else [f"FROM {base}"]) + lines


# The images.

def test_hadolint_has_nothing_to_say_of_the_dockerfile():
    linter = Path(sys.executable).with_name("hadolint")
    ended = subprocess.run([linter, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stdout, ended.stdout + ended.stderr


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_is_nobodys_root_and_has_no_build_tools(target):
    lines = final(target)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000"
    assert not re.search(r"gcc|g\+\+|make|build-essential|-dev\b|pip |git\b", " ".join(lines))
    copied = [line for line in lines if line.startswith("COPY ") and "--from" in line]
    assert copied == [f"COPY --from=packages-{target} /opt/venv /opt/venv"], "no source, no wheel, no cache"


def test_every_package_of_the_images_is_pinned_to_what_the_setup_allows():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    wanted = [Requirement(line) for text in (setup["options"]["install_requires"],
                                             setup["options.extras_require"]["aws"])
              for line in text.strip().splitlines()]
    lines = [line for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines) > 100
    for requirement in wanted:
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement
    assert re.search(r"FROM python:3\.11\.\d+-slim-\w+ AS base", (DOCKER / "Dockerfile").read_text())


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    kept = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for _, lines in stages().values():
        for line in lines:
            if line.startswith("COPY ") and "--from" not in line:
                for source in [word for word in line.split()[1:-1] if not word.startswith("--")]:
                    assert (REPOSITORY / source).exists() and source in kept, source


# AWS.

@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """docker/aws.yaml as Ray's cluster launcher has it before it asks for machines, and moto's account with them."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        home = tmp_path_factory.mktemp("home")
        (home / ".ssh").mkdir()
        for key, value in {"HOME": str(home), "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
            patch.setenv(key, value)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        config = prepare_config(yaml.safe_load((DOCKER / "aws.yaml").read_text()))
        validate_config(config)
        region = config["provider"]["region"]
        iam = boto3.client("iam", region)
        for name in ("de-ray-head", "de-ray-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        config = bootstrap_aws(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node in config["available_node_types"].items():
            asked = copy.deepcopy(node["node_config"])
            # moto's account has none of the images that AWS publishes the names of.
            asked["ImageId"] = boto3.client("ec2", region).describe_images()["Images"][0]["ImageId"]
            provider.create_node(asked, {"ray-user-node-type": name}, 1)
        yield config, boto3.client("ec2", region)


def test_the_heads_gpu_is_the_drivers_alone_and_gpu_workers_come_and_go(launched):
    config, _ = launched
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["gpu_worker"]
    assert config["head_node_type"] == "head" and head["max_workers"] == 0
    assert head["resources"]["CPU"] == 0 == head["resources"]["GPU"]
    assert worker["min_workers"] == 0 and worker["max_workers"] == config["max_workers"] > 1
    assert worker["resources"]["GPU"] == 1 and config["idle_timeout_minutes"] == 10
    assert not config["setup_commands"]
    assert config["docker"]["worker_image"].endswith("gpu") and config["docker"]["head_image"].endswith("gpu")
    assert head["node_config"]["InstanceType"].startswith("g5.")


def test_machines_start_with_their_roles_workers_as_spot(launched):
    _, ec2 = launched
    machines = [m for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]]
    found = {next(t["Value"] for t in m["Tags"] if t["Key"] == "ray-user-node-type"): m for m in machines}
    assert found["gpu_worker"]["InstanceLifecycle"] == "spot" and "InstanceLifecycle" not in found["head"]
    for name, role in (("head", "de-ray-head"), ("gpu_worker", "de-ray-worker")):
        assert found[name]["IamInstanceProfile"]["Arn"].endswith(f"/{role}")


def test_nothing_but_ssh_comes_in_from_outside(launched):
    config, ec2 = launched
    groups = {g["GroupId"]: g for g in ec2.describe_security_groups()["SecurityGroups"]}
    used = {g for node in config["available_node_types"].values() for g in node["node_config"]["SecurityGroupIds"]}
    assert len(used) == 1
    rules = groups[used.pop()]["IpPermissions"]
    outside = [rule for rule in rules if rule["IpRanges"] or rule["Ipv6Ranges"] or rule["PrefixListIds"]]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in outside] == [("tcp", 22, 22)]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert all("RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))


def test_models_and_data_are_mounted_and_no_secret_is_written_down(launched):
    config, _ = launched
    options = config["docker"]["run_options"]
    assert {option.rpartition(":")[0].rpartition(":")[2] for option in options if "--volume" in option} == {
        "/data", "/models"}
    text = (DOCKER / "aws.yaml").read_text()
    assert not re.search(r"(?i)AKIA|secret_access|password", text)
    assert json.dumps(config["file_mounts"]) == '{"/home/ray/.ray/auth_token": "~/.ray/auth_token"}'


def test_a_misspelt_key_does_not_pass_rays_schema():
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DOCKER / "aws.yaml").read_text())
    config["available_node_types"]["gpu_worker"]["max_worker"] = 4
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


# Kubernetes and Slurm.

def test_kuberays_pods_run_the_image_of_this_ray_with_a_token_and_a_shared_volume():
    spec = yaml.safe_load((DOCKER / "kuberay.yaml").read_text())["spec"]
    pinned = re.search(r"^ray==(.*)$", (DOCKER / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert spec["rayVersion"] == pinned and spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert groups[0]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"} and groups[1]["minReplicas"] == 0
    for group in groups:
        container, = group["template"]["spec"]["containers"]
        storage = next(e["value"] for e in container["env"] if e["name"] == "DE_RAY_STORAGE")
        assert storage in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1" and container["image"].endswith("gpu")


def slurms_script(folder, fakes):
    """Run it with stand-ins for commands, which are put into a folder."""
    for name, body in fakes.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    started = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]",
               "SLURM_CPUS_PER_TASK": "8", "SLURM_SUBMIT_DIR": "/shared"}
    return subprocess.run([shutil.which("bash"), DOCKER / "slurm.sh", "problem=digits", "seed=1"], env=started,
                          capture_output=True, text=True, timeout=60)


def test_slurms_script_starts_ray_on_every_node_and_runs_the_command_with_its_exit_code(tmp_path):
    # Slurm's commands as they are on one node: what srun is asked for is written down, and carried out.
    log = tmp_path / "log"
    fakes = {
        "scontrol": "echo one; echo two; echo three",
        "srun": f'echo "srun $*" >>{log}; while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done; exec "$@"',
        "hostname": "echo 10.0.0.1",
        "ray": f'echo "ray $* $RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}}" >>{log}; [[ $1 == status ]] || exec sleep 100',
        "python": f'[[ $1 == -c ]] && exec {sys.executable} "$@"\nsleep 1\necho "python $* $RAY_ADDRESS" >>{log}'
                  "\nexit 3",
    }
    ended = slurms_script(tmp_path, fakes)
    assert ended.returncode == 3, ended.stderr
    lines = log.read_text().splitlines()
    assert lines[-1] == "python -m de_ray.launch +cluster=slurm problem=digits seed=1 10.0.0.1:20007"
    starts = [line for line in lines if line.startswith("ray start")]
    assert len(starts) == 2 and all(line.endswith("token 64") for line in starts)
    assert any("--head" in line and "--num-cpus=8" in line for line in starts)
    assert any(line.startswith("srun --nodes=2 --ntasks=2 --overlap -w two,three ray start --address=10.0.0.1:20007")
               for line in lines)


def test_slurms_script_ends_where_ray_does_not_start(tmp_path):
    fakes = {"scontrol": "echo one", "srun": 'while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done; exec "$@"',
             "hostname": "echo 10.0.0.1", "ray": "[[ $1 == status ]] || echo the port is taken >&2; exit 1",
             "python": f'[[ $1 == -c ]] && exec {sys.executable} "$@"; exit 0'}
    ended = slurms_script(tmp_path, fakes)
    assert ended.returncode == 1
    assert "the port is taken" in ended.stderr and "error: Ray did not start on one" in ended.stderr


def test_the_linters_are_the_ones_that_the_setup_asks_for():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    for line in setup["options.extras_require"]["test"].strip().splitlines():
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name)), line
