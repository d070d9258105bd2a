"""Settings of the study: data, detectors, lengths."""

from dataclasses import dataclass, field, replace
from typing import Any

# relative to the repository's root, so that results do not depend on where that is
DEMO, CONFIGS = "recipes/demo", "benchmarks/configs"


@dataclass(frozen=True)
class Detector:
    """A config, options over it, and a checkpoint.

    A teacher with ``epochs`` is trained by the study first, from its checkpoint or from random weights.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    epochs: int = 0


@dataclass(frozen=True)
class Setting:
    """Data, detectors and lengths of a study.

    ``teachers`` are the chain, the weakest first; the last is the strongest. ``others`` may take the weaker ones' place.
    """

    data: str
    scale: tuple[int, int]
    images: int
    teacher_images: int
    val_images: int
    epochs: int
    batch: int
    student: Detector
    teachers: dict[str, Detector]
    others: dict[str, Detector] = field(default_factory=dict)


def _resnet(depth: int, width: int, channels: int) -> dict[str, Any]:
    """Options for a ResNet of blocks without bottleneck (18, 34) or with (50, 101), of any width, and its FPN."""
    out = width * (4 if depth >= 50 else 1)
    sizes = {"model.neck.in_channels": [out, 2 * out, 4 * out, 8 * out], **_channels(channels)}
    return {"model.backbone.depth": depth, "model.backbone.base_channels": width, **sizes}


def _channels(channels: int) -> dict[str, Any]:
    head = {"model.bbox_head.in_channels": channels, "model.bbox_head.feat_channels": channels}
    return {"model.neck.out_channels": channels, **head}


_SWIN_T = {
    "model.backbone.init_cfg": None,
    "model.backbone.embed_dims": 96,
    "model.backbone.depths": [2, 2, 6, 2],
    "model.backbone.num_heads": [3, 6, 12, 24],
    "model.neck.in_channels": [192, 384, 768],
    **_channels(256),
}
_STUDENT, _GFL, _SWIN = f"{DEMO}/retinanet_r18_w16.py", f"{CONFIGS}/gfl_r18.py", f"{CONFIGS}/retinanet_swin.py"
_SMALL = Setting(
    data="scenes",
    scale=(192, 144),  # what the demo's Swin was trained at
    images=200,
    teacher_images=2400,
    val_images=300,
    epochs=24,
    batch=4,
    student=Detector(_STUDENT, _resnet(18, 24, 64)),
    teachers={
        "gfl": Detector(_GFL, _resnet(18, 16, 64), epochs=4),
        "swin": Detector(_SWIN, checkpoint=f"{DEMO}/swin_w32.pth"),
    },
    others={"r18": Detector(f"{DEMO}/retinanet_r18_w20.py", checkpoint=f"{DEMO}/r18_w20.pth")},
)
_REAL = {"gfl": Detector(_GFL, _resnet(18, 16, 64), epochs=10), "swin": Detector(_SWIN, epochs=24)}
_LOADER = {"train_dataloader.num_workers": 8, "train_dataloader.batch_size": 16, "optim_wrapper.optimizer.lr": 2e-4}
SETTINGS = {
    "scenes": _SMALL,
    "bccd": replace(_SMALL, data="bccd", images=100, teacher_images=292, val_images=72, teachers=_REAL, others={}),
    "nuclei": replace(
        _SMALL,
        data="nuclei",
        images=100,
        teacher_images=300,
        val_images=120,
        scale=(256, 256),
        teachers=_REAL,
        others={},
    ),
    "robocup": replace(
        _SMALL,
        data="robocup",
        images=100,
        teacher_images=400,
        val_images=364,
        scale=(320, 240),
        epochs=16,
        teachers={name: replace(one, epochs=one.epochs * 3 // 5) for name, one in _REAL.items()},
        others={},
    ),
}
# width and height of most images of a set
_OWN_SIZES = {"bccd": (640, 480), "nuclei": (256, 256), "robocup": (304, 400)}
# R18-class student and first teacher, Swin-T-class last teacher
_GPU_SCALE = (512, 384)
_GPU_COUNTS = dict(images=3000, teacher_images=20000, val_images=1000)
_GPU = dict(
    batch=16,
    student=Detector(_STUDENT, _resnet(18, 64, 256) | {"optim_wrapper.optimizer.lr": 2e-4}),
    teachers={
        "gfl": Detector(_GFL, _resnet(50, 64, 256) | _LOADER, epochs=24),
        "swin": Detector(_SWIN, _SWIN_T | _LOADER, epochs=36),
    },
    others={},
)


def on_gpu(setting: Setting) -> Setting:
    """A setting with the detectors, batch and scale of a GPU; scenes in thousands, of a set of images what there is.

    Images are not enlarged to the scale: nothing would be seen that was not there before.
    """
    if setting.data not in _OWN_SIZES:
        return replace(setting, scale=_GPU_SCALE, **_GPU_COUNTS, **_GPU)
    long, short = sorted(_OWN_SIZES[setting.data], reverse=True)
    return replace(setting, scale=(min(_GPU_SCALE[0], long), min(_GPU_SCALE[1], short)), **_GPU)
