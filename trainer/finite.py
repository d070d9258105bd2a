"""A student whose weights are no numbers any more ends its stage: nothing that is not finite is written or handed on."""

from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.runner import Runner

from cache import RecipeError
from trainer.checkpoint import not_finite
from trainer.stage import latest_checkpoint


def refuse_not_finite(runner: Runner, since: int) -> None:
    """End a training that lost its weights, on all workers alike.

    The weights decide, not a loss: a step of float16 whose gradients overflow is skipped by the loss scaling, and does no harm.
    (mmengine's CheckInvalidLossHook would end there; and it knows one step's sum of losses, on one worker.)

    Args:
        runner: behind a step of its training, of which the losses are logged.
        since: steps that were done when this was asked before, in the same epoch.

    Raises:
        RecipeError: parameters or buffers are not finite; the message names the losses that were not, first of all.
    """
    model = runner.model.module if hasattr(runner.model, "module") else runner.model
    lost = not_finite(model.state_dict())
    anywhere = torch.tensor(len(lost))
    all_reduce(anywhere, "max")
    if not anywhere:
        return
    done = runner.iter + 1
    # of several workers the one that saw it first knows which loss it was: behind that step all of them are lost
    step, losses = min(all_gather_object(_first_not_finite(runner, since, done)))
    began = (
        f"the first losses that were not: {', '.join(losses)} in step {step}"
        if losses
        else "all losses were: a gradient was not"
    )
    folder = Path(runner.work_dir)
    kept = latest_checkpoint(folder)
    stays = f"{kept} is from before and stays" if kept else "Nothing is written"
    raise RecipeError(
        f"{folder.name}, epoch {runner.epoch + 1}: after step {done} of {runner.max_iters} {len(lost)} of the student's weights "
        f"are not finite ({', '.join(lost[:2])}, ...); {began}. {stays}; the same recipe comes to the same again. Take a smaller "
        "learning rate (student.cfg_options: {optim_wrapper.optimizer.lr: ...}) or a smaller loss_weight of what is named here, "
        f"or, where training.amp is float16, bfloat16 or none. Another recipe needs another work_dir, or {folder} deleted."
    )


def _first_not_finite(runner: Runner, since: int, done: int) -> tuple[int, list[str]]:
    """The first step, counted from 1, with losses that were not finite on this worker, and their names; without any the next."""
    found: dict[str, int] = {}
    for name, values in runner.message_hub.log_scalars.items():
        history, _ = values.data
        at = np.flatnonzero(~np.isfinite(history[-(done - since) :]))
        if name.startswith("train/") and "loss" in name and at.size:
            found[name.removeprefix("train/")] = since + 1 + int(at[0])
    first = min(found.values(), default=done + 1)
    losses = sorted(name for name, step in found.items() if step == first)
    return first, [name for name in losses if name != "loss"] or losses
