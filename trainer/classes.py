"""Whether a detector's classes come in the data set's order: labels are numbers, and no shape tells them apart."""

from collections.abc import Sequence

from cache import RecipeError
from trainer.checkpoint import read_classes


def refuse_other_order(checkpoint: str, classes: Sequence[str], key: str) -> None:
    """Refuse a checkpoint that names the data set's classes in another order.

    One that names none, or others, says nothing about their order.

    Args:
        checkpoint: its file.
        classes: the data set's, in the order of its file.
        key: the recipe's key, for errors.

    Raises:
        RecipeError: another order; the message has both.
        TeacherLoadError: not a checkpoint.
    """
    named = read_classes(checkpoint, key)
    if named is None or named == tuple(classes) or sorted(named) != sorted(classes):
        return
    # mmdet numbers classes by the annotation file that it trains on, whatever the order of the names that it is given
    raise RecipeError(
        f"{key}: {checkpoint}: its classes are {', '.join(named)}; those of the data set are the same in another order, "
        f"{', '.join(classes)}, and labels are numbers: one is taken for another. Give `categories` of the annotation files "
        "the checkpoint's order. If it was trained on files of this order and only its names are in another, take its `meta` out."
    )
