"""The cache of teacher targets: geometry of views, plan, codec, shards, manifest, writer and reader.

Runs without mmdet and without ray. What the floors above may use is what is exported here.
"""

from cache.codec import Encoded, decode, encode
from cache.detections import Detections
from cache.errors import (
    BudgetError,
    CorruptShardError,
    LeaseHeldError,
    MissingRowsError,
    MtpdError,
    RecipeError,
    StaleCacheError,
    TeacherLoadError,
)
from cache.layout import FORMAT_VERSION, GroupInfo, Level, Precision, differences, level_name
from cache.lease import Lease
from cache.manifest import Index, compact, read_table
from cache.plan import Bucket, Images, Plan, Row, Unit, make_plan
from cache.reader import Targets, TeacherCache, existing_slots, find_group, list_groups
from cache.storage import LocalStorage, open_storage
from cache.views import View, ViewPolicy, padded, resized
from cache.writer import RowTargets, prepare, write_unit

__all__ = [
    "FORMAT_VERSION",
    "Bucket",
    "BudgetError",
    "CorruptShardError",
    "Detections",
    "Encoded",
    "GroupInfo",
    "Images",
    "Index",
    "Lease",
    "LeaseHeldError",
    "Level",
    "LocalStorage",
    "MissingRowsError",
    "MtpdError",
    "Plan",
    "Precision",
    "RecipeError",
    "Row",
    "RowTargets",
    "StaleCacheError",
    "Targets",
    "TeacherCache",
    "TeacherLoadError",
    "Unit",
    "View",
    "ViewPolicy",
    "compact",
    "decode",
    "differences",
    "encode",
    "existing_slots",
    "find_group",
    "level_name",
    "list_groups",
    "make_plan",
    "open_storage",
    "padded",
    "prepare",
    "read_table",
    "resized",
    "write_unit",
]
