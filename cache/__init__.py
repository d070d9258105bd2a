"""The cache of teacher targets: geometry of views, plan, codec, shards, manifest, writer and reader.

Runs without mmdet and without ray. What the floors above may use is what is exported here.
"""

from cache.codec import Encoded, decode, encode, pool
from cache.detections import Detections
from cache.errors import (
    BudgetError,
    CorruptShardError,
    LeaseHeldError,
    MissingRowsError,
    MtpdError,
    RecipeError,
    StaleCacheError,
    StorageError,
    TeacherLoadError,
)
from cache.follow import Follower
from cache.gc import Garbage, find_garbage, remove, whole_group
from cache.heads import head_digest, pack_head, read_head, write_head
from cache.index import Index
from cache.layout import (
    FORMAT_VERSION,
    Compression,
    DenseSpec,
    GroupInfo,
    Level,
    Precision,
    differences,
    fingerprint,
    group_name,
    level_name,
    serves,
)
from cache.lease import LEASE_SECONDS, Holder, Lease, fence, lease_holder
from cache.manifest import RowRecord, compact, load_index, part_names, records_of
from cache.plan import Bucket, Images, Plan, Row, Unit, make_plan
from cache.progress import NAMED_FAILURES, FailedRow, RunProgress, State, read_progress, write_progress
from cache.reader import TeacherCache, find_group, list_groups, planned_rows, planned_views, read_group
from cache.references import Reference, Use, forget, needed_by, refer, reference_name, references
from cache.repeats import repeated_requests
from cache.storage import LocalStorage, Storage, open_storage
from cache.targets import DenseLevel, RowLayout, Targets
from cache.verify import Damage, Report, repair, verify
from cache.views import Policy, SampledPolicy, View, ViewPolicy, padded, resized
from cache.waiting import PrecomputeWatch, RowWaiter, await_first_row
from cache.writer import DenseArrays, RowTargets, prepare, write_unit

__all__ = [
    "FORMAT_VERSION",
    "LEASE_SECONDS",
    "NAMED_FAILURES",
    "Bucket",
    "BudgetError",
    "Compression",
    "CorruptShardError",
    "Damage",
    "DenseArrays",
    "DenseLevel",
    "DenseSpec",
    "Detections",
    "Encoded",
    "FailedRow",
    "Follower",
    "Garbage",
    "GroupInfo",
    "Holder",
    "Images",
    "Index",
    "Lease",
    "LeaseHeldError",
    "Level",
    "LocalStorage",
    "MissingRowsError",
    "MtpdError",
    "Plan",
    "Policy",
    "Precision",
    "PrecomputeWatch",
    "RecipeError",
    "Reference",
    "Report",
    "Row",
    "RowLayout",
    "RowRecord",
    "RowTargets",
    "RowWaiter",
    "RunProgress",
    "SampledPolicy",
    "StaleCacheError",
    "State",
    "Storage",
    "StorageError",
    "Targets",
    "TeacherCache",
    "TeacherLoadError",
    "Unit",
    "Use",
    "View",
    "ViewPolicy",
    "await_first_row",
    "compact",
    "decode",
    "differences",
    "encode",
    "fence",
    "find_garbage",
    "find_group",
    "fingerprint",
    "forget",
    "group_name",
    "head_digest",
    "lease_holder",
    "level_name",
    "list_groups",
    "load_index",
    "make_plan",
    "needed_by",
    "open_storage",
    "pack_head",
    "padded",
    "part_names",
    "planned_rows",
    "planned_views",
    "pool",
    "prepare",
    "read_group",
    "read_head",
    "read_progress",
    "records_of",
    "refer",
    "reference_name",
    "references",
    "remove",
    "repair",
    "repeated_requests",
    "resized",
    "serves",
    "verify",
    "whole_group",
    "write_head",
    "write_progress",
    "write_unit",
]
