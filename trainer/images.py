"""Image files as mmdet's loading decodes them, with what is wrong with one said in words."""

from pathlib import Path

import mmcv
import numpy as np


class UnusableImageError(ValueError):
    """An image, or a view of it, that cannot be used; the message is why, to be read behind the image's name."""


def read_image(path: str | Path, width: int, height: int) -> tuple[np.ndarray, bytes]:
    """Read and decode an image.

    Args:
        width, height: in pixels, as the annotation file states them.

    Returns:
        The image (h, w, 3) uint8, BGR, and the file's bytes.

    Raises:
        UnusableImageError: it cannot be read or decoded, or is of another size.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UnusableImageError(f"cannot be read: {error.strerror}") from error
    try:
        image = mmcv.imfrombytes(content)  # as mmdet's LoadImageFromFile decodes it
    except Exception as error:  # decoders raise what they like on damaged files
        raise UnusableImageError(f"cannot be decoded: {error}") from error
    if image is None:
        raise UnusableImageError("cannot be decoded")
    if image.shape[:2] != (height, width):
        raise UnusableImageError(f"is {image.shape[1]}x{image.shape[0]}, the annotation file says {width}x{height}")
    return image, content
