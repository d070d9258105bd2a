"""The roles' policies, enforced by a server: they allow what a cache does, no action of them is idle, and no more is allowed."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from cache import MtpdError, objects
from cache.objects import ObjectStorage
from tests.cache import object_store
from tests.cache.object_store import Bucket, bucket, request  # noqa: F401 - a fixture
from tests.deploy.files import DEPLOY

NAME = "mtpd-cache"
URI = f"s3://{NAME}/coco"
PART = 5 * 2**20
REFUSED = "access was refused|Access Denied"


def policy(role: str) -> dict[str, Any]:
    return json.loads((DEPLOY / "s3" / f"cache-{role}.json").read_text())


@pytest.fixture
def act_as(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], ObjectStorage]]:  # noqa: F811
    """The cache's storage, of a user who may do what a policy says."""
    address = f"http://127.0.0.1:{object_store.server_port()}"
    clients = {
        kind: boto3.client(
            kind,
            "us-east-1",
            endpoint_url=address,
            aws_access_key_id=object_store.KEY,
            aws_secret_access_key=object_store.SECRET,
        )
        for kind in ("iam", "s3")
    }
    clients["s3"].create_bucket(Bucket=NAME)
    clients["s3"].put_object(Bucket=NAME, Key="coco/there", Body=b"0123456789")
    clients["s3"].put_object(Bucket=NAME, Key="others/there", Body=b"0123456789")
    monkeypatch.setattr(objects, "_PART_BYTES", PART)

    def act(allowed: dict[str, Any]) -> ObjectStorage:
        if any("s3:DeleteObject" in statement["Action"] for statement in allowed["Statement"]):
            # the client deletes by DeleteObjects, which AWS decides object by object, moto by the bucket they are in
            extra = {"Effect": "Allow", "Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{NAME}"}
            allowed = {**allowed, "Statement": [*allowed["Statement"], extra]}
        clients["iam"].create_user(UserName="role")
        clients["iam"].put_user_policy(UserName="role", PolicyName="cache", PolicyDocument=json.dumps(allowed))
        key = clients["iam"].create_access_key(UserName="role")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        objects._open.cache_clear()
        request("POST", "/moto-api/reset-auth", b"0")  # from now on the server asks who it is, and what they may
        return ObjectStorage(URI)

    yield act
    request("POST", "/moto-api/reset-auth", b"inf")
    request("POST", "/moto-api/reset")
    objects._open.cache_clear()


def read_everything(storage: ObjectStorage) -> None:
    assert storage.read("there") == b"0123456789"
    end, size, tag = storage.read_end("there", 4)
    assert (end, size) == (b"6789", 10)
    assert storage.read_range("there", 2, 3, tag) == b"234"
    assert storage.exists("there")
    assert not storage.exists("missing")
    assert "coco" not in storage.folders()
    assert [entry.name for entry in storage.walk("")] == ["there"]


def write_everything(storage: ObjectStorage) -> None:
    assert storage.write("a/small", [b"1"]) == 1
    assert storage.write("a/large", [bytes(PART), b"1"]) == PART + 1  # in parts
    assert storage.swap("a/lease", None, b"mine")
    assert not storage.swap("a/lease", None, b"another's")
    assert storage.swap("a/lease", b"mine", b"renewed")
    assert storage.names("a") == ["a/large", "a/lease", "a/small"]
    assert storage.swap("a/lease", b"renewed", None)
    for name in storage.names("a"):
        storage.delete(name)
    assert storage.names("a") == []


def use(storage: ObjectStorage) -> None:
    read_everything(storage)
    write_everything(storage)


def test_the_writer_may_do_all_that_a_cache_does(act_as: Callable[..., ObjectStorage]) -> None:
    use(act_as(policy("writer")))
    with pytest.raises(MtpdError, match=REFUSED):
        ObjectStorage(f"s3://{NAME}/others").read("there")


@pytest.mark.parametrize("action", ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"])
def test_no_action_of_the_writer_is_idle(act_as: Callable[..., ObjectStorage], action: str) -> None:
    less = policy("writer")
    for statement in less["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        statement["Action"] = [one for one in actions if one != action] or ["s3:GetBucketLocation"]
    storage = act_as(less)
    with pytest.raises(MtpdError, match=REFUSED):
        use(storage)


def test_the_reader_reads_and_changes_nothing(act_as: Callable[..., ObjectStorage]) -> None:
    storage = act_as(policy("reader"))
    read_everything(storage)
    for change in (
        lambda: storage.write("there", [b"1"]),
        lambda: storage.delete("there"),
        lambda: storage.swap("a/lease", None, b"mine"),
    ):
        with pytest.raises(MtpdError, match=REFUSED):
            change()


def test_the_lifecycle_is_one_of_s3(bucket: Bucket) -> None:  # noqa: F811
    client = boto3.client(
        "s3",
        "us-east-1",
        endpoint_url=f"http://127.0.0.1:{object_store.server_port()}",
        aws_access_key_id=object_store.KEY,
        aws_secret_access_key=object_store.SECRET,
    )
    rules = json.loads((DEPLOY / "s3" / "lifecycle.json").read_text())
    client.put_bucket_lifecycle_configuration(Bucket=bucket.name, LifecycleConfiguration=rules)
    (kept,) = client.get_bucket_lifecycle_configuration(Bucket=bucket.name)["Rules"]
    assert kept["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    assert "Expiration" not in kept, "rows do not grow old"
