import numpy as np

from trainer import ApplyView


def test_a_view_moves_pixels_and_boxes_together() -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:40, 10:30] = 255
    results = {"img": image, "img_shape": (60, 80), "ori_shape": (60, 80), "gt_bboxes": np.array([[10.0, 20, 30, 40]])}
    for view, x in ((0, 20), (1, 100)):
        made = ApplyView([160, 120])(
            {**results, "img": image.copy(), "gt_bboxes": _boxes(results["gt_bboxes"]), "view": view}
        )
        ys, xs = np.nonzero(made["img"][..., 0] > 127)
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, 40, x + 40, 80)
        assert made["gt_bboxes"].tensor.tolist() == [[x, 40, x + 40, 80]]
        assert made["flip"] is (view == 1)


def _boxes(array: np.ndarray):
    from mmdet.structures.bbox import HorizontalBoxes

    return HorizontalBoxes(array.astype(np.float32).copy())
