"""The Kubernetes files, as far as they can be tried without a cluster.

KubeRay's objects against its published API, the pods in them and everything else against Kubernetes' own schemas, and their
sizes by what the autoscaler itself makes of them.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from tests.deploy.files import JOBS, RECIPE, documents, launcher, pod_templates, ray_clusters

SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
VERSION = "1.33"


@pytest.mark.parametrize("name", ["raycluster", *JOBS])
def test_an_object_of_kuberay_has_the_fields_of_its_api(name: str) -> None:
    (content,) = documents(name)
    jsonschema.validate(content, SCHEMA)
    content["spec"]["backofLimit"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)


@pytest.mark.parametrize("name", pod_templates())
def test_a_pod_is_one_of_kubernetes_and_confined(name: str) -> None:
    template = pod_templates()[name]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}, "template": template}
    kubernetes_validate.validate(pod, VERSION, strict=True)
    spec = template["spec"]
    assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "mtpd", (
        "the network policy selects it by this"
    )
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is name.endswith(" head"), "only the autoscaler talks to Kubernetes"
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"]["memory"]
        mounts = {mount["name"]: mount for mount in container.get("volumeMounts", [])}
        assert mounts.keys() == volumes.keys(), "a volume without a mount, or a mount without a volume"
        assert all(mount.get("readOnly") for mount in mounts.values() if mount["name"] in ("data", "recipe"))


def test_everything_else_is_of_kubernetes_and_what_pods_name_is_there() -> None:
    there = documents("base")
    for content in there:
        kubernetes_validate.validate(content, VERSION, strict=True)
    names = {(content["kind"], content["metadata"]["name"]) for content in there}
    for template in pod_templates().values():
        spec = template["spec"]
        if account := spec.get("serviceAccountName"):
            assert ("ServiceAccount", account) in names
        for volume in spec.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
    (policy,) = (content for content in there if content["kind"] == "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/part-of": "mtpd"}
    for rule in policy["spec"]["ingress"]:
        assert rule["from"], "a rule without `from` lets everyone in"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_tried_again_ends_and_leaves_nothing_behind(name: str) -> None:
    spec = documents(name)[0]["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > 3600
    assert spec["shutdownAfterJobFinishes"], "ttlSecondsAfterFinished counts only with it"
    assert spec["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("name", ray_clusters())
def test_a_cluster_asks_for_a_token_and_has_the_ray_of_the_constraints(name: str) -> None:
    spec = ray_clusters()[name]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False


def test_the_launchers_file_is_one_of_ray_with_ssh_from_inside_and_a_dashboard_on_loopback() -> None:
    content = launcher()
    validate_config(prepare_config(content))
    (start,) = (command for command in content["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in content["docker"]["run_options"]
    ranges = [r["CidrIp"] for p in content["provider"]["security_group"]["IpPermissions"] for r in p["IpRanges"]]
    assert ranges
    assert not any(one.endswith("/0") for one in ranges)
    for node_type in content["available_node_types"].values():
        assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def node_types(config: dict[str, Any]) -> dict[str, NodeTypeConfig]:
    """What the autoscaler knows of the nodes that it may start."""
    return {
        name: NodeTypeConfig(name, one.get("min_workers", 0), one.get("max_workers", 0), resources=one["resources"])
        for name, one in config["available_node_types"].items()
        if name != config["head_node_type"]
    }


def clusters() -> dict[str, dict[str, Any]]:
    """The autoscaler's configuration of every cluster."""
    found = {"ray-cluster": launcher()}
    for name, spec in ray_clusters().items():
        config = _derive_autoscaling_config_from_ray_cr({"metadata": documents(name)[0]["metadata"], "spec": spec})
        validate_config(config)
        found[name] = config
    return found


def started(config: dict[str, Any], demand: dict[str, float], count: int, *, gang: bool) -> Counter[str]:
    """Nodes that the autoscaler starts from none for so many actors, or for one placement group of workers."""
    types = node_types(config)
    one = ResourceRequestUtil.make(demand)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=sum(t.max_worker_nodes for t in types.values()),
        resource_requests=[] if gang else ResourceRequestUtil.group_by_count([one] * count),
        gang_resource_requests=[GangResourceRequest(requests=[one] * count)] if gang else [],
    )
    reply = ResourceDemandScheduler().schedule(request)
    return Counter({launch.instance_type: launch.count for launch in reply.to_launch})


def roles(name: str) -> dict[str, str]:
    """The role of each of a cluster's worker node types."""
    if name == "ray-cluster":
        types = launcher()["available_node_types"]
        return {kind: one["node_config"]["IamInstanceProfile"]["Arn"].rpartition("/")[2] for kind, one in types.items()}
    accounts = {
        one["metadata"]["name"]: one["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].rpartition("/")[2]
        for one in documents("base")
        if one["kind"] == "ServiceAccount"
    }
    groups = ray_clusters()[name]["workerGroupSpecs"]
    return {group["groupName"]: accounts[group["template"]["spec"]["serviceAccountName"]] for group in groups}


@pytest.mark.parametrize("name", ["ray-cluster", "raycluster", "rayjob-precompute"])
def test_an_actor_may_write_to_the_cache_wherever_it_lands(name: str) -> None:
    """An actor that may not ends its teacher's run at the first write."""
    recipe = yaml.safe_load(RECIPE.read_text())
    actors = recipe["actors"]
    actor = {"CPU": actors["cpus"], "GPU": actors["gpus"]}
    landed = started(clusters()[name], actor, actors["max"] * len(recipe["teachers"]), gang=False)
    if name != "rayjob-precompute":
        assert landed.keys() == {"teachers-spot", "students-on-demand"}, "all teachers' actors are more than spot nodes"
    assert {kind: roles(name)[kind] for kind in landed} == dict.fromkeys(landed, "mtpd-cache-writer")


def test_students_that_have_a_cluster_of_their_own_may_only_read() -> None:
    assert roles("rayjob-train") == {"students-on-demand": "mtpd-cache-reader"}


@pytest.mark.parametrize("name", ["ray-cluster", "raycluster", *JOBS])
def test_from_no_node_teachers_get_spot_nodes_and_students_only_on_demand_ones(name: str) -> None:
    config = clusters()[name]
    assert all(one.min_worker_nodes == 0 for one in node_types(config).values()), "nothing runs while nothing is to do"
    recipe = yaml.safe_load(RECIPE.read_text())
    actors, training = recipe["actors"], recipe["training"]
    teacher = {"CPU": actors["cpus"], "GPU": actors["gpus"]}
    student = {"CPU": training["cpus"], "GPU": training["gpus"]}
    if name != "rayjob-train":
        assert started(config, teacher, actors["max"], gang=False) == {"teachers-spot": actors["max"]}
    if name != "rayjob-precompute":
        assert started(config, student, training["workers"], gang=True) == {"students-on-demand": training["workers"]}
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0, "an actor on the head would die with what it feeds"
