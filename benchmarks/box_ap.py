"""A trained student's box AP as COCO computes it, not rounded: what mmdet's CocoMetric gives comes in tenths of a point."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trainer.checkpoint import load_strict

_MOST_BOXES = [100, 300, 1000]  # of an image; CocoMetric's own


def box_ap(stage: Path) -> dict[str, float]:
    """Evaluate the student of a stage that is done on its val set, as its training did.

    Args:
        stage: the stage's folder, which has ``student.py`` and ``student.pth``.

    Returns:
        ``mAP`` and ``mAP_50`` in points.
    """
    config = Config.fromfile(stage / "student.py")
    file = config.val_evaluator.ann_file
    model = MODELS.build(config.model)
    load_strict(model, stage / "student.pth", "student")
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # pycocotools prints
        prefix = f"{folder}/found"
        runner = Runner(
            model=model,
            work_dir=folder,
            test_dataloader=config.val_dataloader,
            test_cfg=dict(type="TestLoop"),
            test_evaluator=dict(
                type="CocoMetric", metric="bbox", ann_file=file, format_only=True, outfile_prefix=prefix
            ),
            default_scope="mmdet",
            log_level="WARNING",
            experiment_name=f"box-ap-{Path(folder).name}",
        )
        runner.test()
        found = json.loads(Path(f"{prefix}.bbox.json").read_text())
        if not found:  # pycocotools takes no empty list
            return {"mAP": 0.0, "mAP_50": 0.0}
        truth = COCO(file)
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.params.maxDets = _MOST_BOXES
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"mAP": 100 * float(evaluation.stats[0]), "mAP_50": 100 * float(evaluation.stats[1])}
