"""Ray's cluster launcher: what its own code makes of the file, and what it asks of AWS, on moto's EC2 in this process."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from tests.deploy.files import MANUAL, launcher


def test_nothing_is_installed_on_a_node() -> None:
    """Nodes need no way to the internet; Ray's defaults, which stand where the file says nothing, would install packages."""
    made = prepare_config(launcher())
    assert (made["setup_commands"], made["head_setup_commands"], made["worker_setup_commands"]) == ([], [], [])
    assert not any("pip" in line for line in (*made["head_start_ray_commands"], *made["worker_start_ray_commands"]))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The operations of EC2 that are asked for from now on."""
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher writes its key pair there
    names: list[str] = []
    with mock_aws():
        boto3.setup_default_session()
        boto3.DEFAULT_SESSION.events.register("before-call.ec2", lambda model, **_: names.append(model.name))
        yield names
    boto3.DEFAULT_SESSION = None


def test_it_starts_and_ends_nodes_of_the_image_that_the_file_names_with_the_rights_of_the_manual(
    asked: list[str],
) -> None:
    content: dict[str, Any] = launcher()
    ec2 = boto3.client("ec2", content["provider"]["region"])
    subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    image = ec2.describe_images()["Images"][0]["ImageId"]
    profile = boto3.client("iam").create_instance_profile(InstanceProfileName="any")["InstanceProfile"]["Arn"]
    for one in content["available_node_types"].values():
        one["node_config"] |= {"SubnetIds": [subnet], "IamInstanceProfile": {"Arn": profile}}
    ready = bootstrap_aws(prepare_config(content))
    for one in ready["available_node_types"].values():
        assert one["node_config"]["ImageId"] == "MACHINE_IMAGE", "Ray's default is of years ago"
        one["node_config"]["ImageId"] = image
    asked.clear()
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    for name, one in ready["available_node_types"].items():
        if name != ready["head_node_type"]:
            provider.create_node(one["node_config"], {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name}, 1)
    nodes = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    assert len(nodes) == 2
    assert all(provider.internal_ip(node) for node in nodes)
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(nodes)
    assert set(asked) == set(re.findall(r"`ec2:(\w+)`", MANUAL.read_text()))
