"""For how many samples a step a config's learning rate is made, and how many a recipe's steps have."""

from mmengine.config import Config

from cache import RecipeError
from trainer.config import load_config
from trainer.recipe import Recipe


def follow_batch(cfg: Config) -> None:
    """Scale the learning rate to the total batch where the config asks for it (``auto_scale_lr.enable``).

    Here and not by mmengine, which would count the total batch once for each worker.

    Args:
        cfg: a config whose ``train_dataloader.batch_size`` is the total batch; it is changed.

    Raises:
        RecipeError: it does not say for how many samples its learning rate is.
    """
    scaling = cfg.get("auto_scale_lr") or {}
    if not scaling.get("enable"):
        return
    if not scaling.get("base_batch_size"):
        raise RecipeError(
            "student.config: auto_scale_lr.enable: for how many samples a step its learning rate is made is not known. Say it: "
            "student.cfg_options: {auto_scale_lr.base_batch_size: 16}"
        )
    cfg.optim_wrapper.optimizer.lr *= cfg.train_dataloader.batch_size / scaling.base_batch_size
    scaling.enable = False


def batch_note(recipe: Recipe) -> str | None:
    """One sentence where a recipe's steps have more or less samples than the student's learning rate is made for.

    None where they agree, where the rate follows the batch, where the recipe sets the rate itself, and where the config does
    not say for how many samples its rate is.
    """
    spec, total = recipe.student, recipe.training.batch_size
    cfg = load_config(spec.config, spec.cfg_options, "student.config")
    scaling, batch = cfg.get("auto_scale_lr") or {}, total or cfg.train_dataloader.batch_size
    made_for = scaling.get("base_batch_size")
    if made_for in (None, batch) or scaling.get("enable"):
        return None
    rate = cfg.optim_wrapper.optimizer.get("lr")
    if rate is None or rate != load_config(spec.config, None, "student.config").optim_wrapper.optimizer.get("lr"):
        return None
    return (
        f"the student's learning rate of {rate:g} is for {made_for} samples a step (auto_scale_lr.base_batch_size), this "
        f"recipe's steps have {batch}: set training.batch_size: {made_for}, or have the rate scaled, student.cfg_options: "
        "{auto_scale_lr.enable: true}"
    )
