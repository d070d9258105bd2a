"""`ApplyView`, `KeepWholeView` and `LoadTeacherTargets`: mmdet transforms, usable in any mmdet config."""

from typing import Any, Literal

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.datasets.transforms import RandomFlip, Resize
from mmdet.registry import TRANSFORMS
from mmengine.logging import print_log

from cache import Policy, RowWaiter, TeacherCache, ViewPolicy
from trainer.asking import RowAsker
from trainer.targets import CachedMaps


@TRANSFORMS.register_module()
class ApplyView(BaseTransform):
    """Make one view of an image and its annotations: the only geometry between file and network, on both sides.

    The view is ``results["view"]``; where that is absent one is drawn at random and set.

    Args:
        scale: one (long edge, short edge) in pixels, or several.
        flip: ``both`` or ``none``.
    """

    def __init__(self, scale: list[Any], flip: str = "both") -> None:
        scales = [scale] if np.isscalar(scale[0]) else scale
        self.policy = ViewPolicy(tuple((int(a), int(b)) for a, b in scales), flip)  # type: ignore[arg-type]
        self._resize = {view.scale: Resize(scale=view.scale, keep_ratio=True) for view in self.policy}
        self._flip = RandomFlip(prob=1.0, direction="horizontal")

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize, then mirror if the view is a mirrored one."""
        if "view" not in results:
            results["view"] = int(np.random.randint(len(self.policy)))  # noqa: NPY002 - the generator that mmengine seeds
        view = self.policy[results["view"]]
        results = self._resize[view.scale](results)
        if view.flip:
            return self._flip(results)
        results["flip"], results["flip_direction"] = False, None
        return results


def view_config(policy: Policy, ann_file: str, img_dir: str, keep_masks: bool = False) -> dict[str, Any]:
    """The config of the transform that makes a policy's views: `ApplyView`, or `ApplySampledView`, which loads as well."""
    if isinstance(policy, ViewPolicy):
        return dict(type="ApplyView", scale=[list(scale) for scale in policy.scales], flip=policy.flip)
    return dict(
        type="ApplySampledView", policy=policy.to_json(), ann_file=ann_file, img_dir=img_dir, keep_masks=keep_masks
    )


@TRANSFORMS.register_module()
class KeepWholeView(BaseTransform):
    """Keep a view's pixels in ``whole_view`` before they are resized for a student at reduced input scale.

    A live teacher looks at them; ``PackDetInputs`` packs them if its ``meta_keys`` have the name.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Set ``whole_view``: (h, w, 3) uint8, BGR."""
        return {**results, "whole_view": results["img"]}


@TRANSFORMS.register_module()
class LoadTeacherTargets(BaseTransform):
    """Give a packed sample its teacher's features, as stored; they are dequantised on the student's device.

    Goes behind ``PackDetInputs``, whose ``meta_keys`` must include ``img_id`` and ``view``. The sample gets a `CachedMaps`
    under the teacher's name in ``teacher_maps``; several teachers take one such transform each.

    Args:
        uri: the cache.
        teacher: the teacher's name.
        fingerprint: the fingerprint record that is wanted; anything else is refused.
        levels: levels to read; all by default.
        top_k: positions a level of the dense head's outputs to read, the best; 0 for none.
        detections: read the detections; a group that stores none is refused (StaleCacheError) when this is built.
        local_dir, local_bytes: see `TeacherCache.open`.
        on_missing: ``wait`` for a row that is not committed, as long as a precompute may commit it; or have the teacher
            service ``compute`` it.
        service: URL of the teacher service.
    """

    def __init__(
        self,
        uri: str,
        teacher: str,
        fingerprint: dict[str, Any] | None = None,
        levels: list[str] | None = None,
        top_k: int = 0,
        detections: bool = False,
        local_dir: str | None = None,
        local_bytes: int | None = None,
        on_missing: Literal["error", "wait", "compute"] = "error",
        service: str = "",
    ) -> None:
        self.cache = TeacherCache.open(
            uri,
            teacher,
            fingerprint=fingerprint,
            levels=levels,
            dense=top_k > 0,
            detections=detections,
            local_dir=local_dir,
            local_bytes=local_bytes,
        )
        self._top_k, self._detections = top_k, detections
        self._waiter: RowWaiter | RowAsker | None = None
        if on_missing == "wait":
            self._waiter = RowWaiter(self.cache, _tell)
        elif on_missing == "compute":
            self._waiter = RowAsker(self.cache, service, _tell)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Read one row.

        Raises:
            MissingRowsError: it is not committed; or, where it was waited for, it will not be.
            CorruptShardError: it is damaged.
            StorageError: the object storage does not answer.
        """
        sample = results["data_samples"]
        if self._waiter is not None and (sample.img_id, sample.view) not in self.cache:
            self._waiter.wait(sample.img_id, sample.view)
        # a copy: a view would drag its whole shard along when a loader's worker hands it over
        targets = self.cache[sample.img_id, sample.view].copy()
        detections = targets.detections if self._detections else None
        maps = CachedMaps(targets.buffer, targets.layout, detections, self._top_k, self.cache.last_kept)
        return {**results, "teacher_maps": {**results.get("teacher_maps", {}), self.cache.info.teacher: maps}}


def _tell(text: str) -> None:
    print_log(text, "current")
