"""One optimiser step on a total batch: a worker's share of it, in micro-batches where the share is too large for one pass."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import get_world_size
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn

from cache import RecipeError
from trainer import parts
from trainer.batch_norm import share_batch_norm, trains_on_batches
from trainer.batches import share as share_of


def take_step(model: nn.Module, distiller: Any, data: dict[str, Any], optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
    """Forward, backward and update.

    With several workers, or micro-batches, the gradient is that of the whole batch up to rounding. Micro-batches cost a forward
    pass without gradients more: what all of them are normalised by must be known before the first one's gradient is taken.

    Args:
        model: the distiller, or what wraps it.
        data: this worker's share as the loader gives it.

    Returns:
        Losses to log; of several parts an estimate by this worker's own.

    Raises:
        RecipeError: micro-batches do not suit this student or a mechanism.
    """
    world, share = get_world_size(), len(data["inputs"])
    if world == 1 and (distiller.micro_batch or share) >= share:
        with optim_wrapper.optim_context(model):
            data = distiller.data_preprocessor(data, True)
            loss, logs = distiller.parse_losses(model(**data, mode="loss"))
        optim_wrapper.update_params(loss)
        return logs
    samples = distiller.batch_size if world > 1 and distiller.batch_size else share * world
    micro = distiller.micro_batch or samples
    # shares differ by one at most: every worker knows in how many pieces each of the others cuts its own
    cuts = [-(-len(share_of(range(samples), rank, world)) // micro) for rank in range(world)]
    if max(cuts) > 1:
        _check_micro_batches(distiller)
    with parts.cut(sum(cuts), samples):
        pieces = _pieces(distiller, optim_wrapper, data, -(-share // micro))
        if max(cuts) > 1:
            with torch.no_grad(), parts.recording():
                for piece in pieces:
                    parts.next_micro_batch()
                    with optim_wrapper.optim_context(distiller):
                        distiller(**piece, mode="loss")
        return _descend(model, distiller, pieces, optim_wrapper, samples / share)


def _pieces(distiller: Any, optim_wrapper: OptimWrapper, data: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The share in pieces, preprocessed, all padded to the total batch's size: what lies behind an image's edge reaches it."""
    size = len(data["inputs"])
    pieces = []
    for k in range(number):
        one = slice(k * size // number, (k + 1) * size // number)
        piece = {key: _cut(value, one) for key, value in data.items()}
        with optim_wrapper.optim_context(distiller):
            pieces.append(distiller.data_preprocessor(piece, True))
    sizes = [tuple(piece["inputs"].shape[-2:]) for piece in pieces]
    whole = parts.widest((max(h for h, _ in sizes), max(w for _, w in sizes)))
    return [_widened(piece, whole, distiller.data_preprocessor.student) for piece in pieces]


def _cut(value: Any, one: slice) -> Any:
    return {name: of[one] for name, of in value.items()} if isinstance(value, dict) else value[one]


def _widened(piece: dict[str, Any], size: tuple[int, int], preprocessor: Any) -> dict[str, Any]:
    inputs: Tensor = piece["inputs"]
    height, width = inputs.shape[-2:]
    if (height, width) == size:
        return piece
    padded = F.pad(inputs, (0, size[1] - width, 0, size[0] - height), value=preprocessor.pad_value)
    for sample in piece["data_samples"]:
        sample.set_metainfo({"batch_input_shape": size})
    if getattr(preprocessor, "pad_mask", False):
        preprocessor.pad_gt_masks(piece["data_samples"])
    return {**piece, "inputs": padded}


def _descend(
    model: nn.Module, distiller: Any, pieces: Sequence[dict[str, Any]], optim_wrapper: OptimWrapper, scale: float
) -> dict[str, Tensor]:
    """Backward and update; ``scale`` makes of the losses of the pieces an estimate of the whole batch's."""
    logged: list[dict[str, Tensor]] = []
    # the wrapper averages gradients over workers; they are to be added up
    world = get_world_size()
    for number, piece in enumerate(pieces, start=1):
        last = number == len(pieces)
        parts.next_micro_batch()
        # gradients are exchanged once, with the last
        with model.no_sync() if not last and world > 1 else nullcontext():
            with optim_wrapper.optim_context(model):
                loss, logs = distiller.parse_losses(model(**piece, mode="loss"))
            logged.append(logs)
            if last:
                optim_wrapper.update_params(loss * world)
            else:
                optim_wrapper.backward(loss * world)
    return {
        name: torch.stack([logs[name].detach() for logs in logged]).sum() * scale
        if "loss" in name
        else logged[-1][name]
        for name in logged[-1]
    }


def _check_micro_batches(distiller: Any) -> None:
    if getattr(distiller, "_may_be_cut", False):
        return
    if not distiller.adds_up:
        raise RecipeError(
            f"training.micro_batch: how the losses of a {type(distiller.student).__name__} with these heads are normalised is "
            "not known here. Leave micro_batch out, and take a smaller training.batch_size or more workers."
        )
    if names := trains_on_batches(distiller.student):
        raise RecipeError(
            f"training.micro_batch: {len(names)} batch normalisations of the student use the statistics of the batch "
            f"({names[0]}, ...), which micro-batches would change. Freeze them (student.cfg_options: "
            "{model.backbone.norm_eval: true}) or take another norm, or leave micro_batch out."
        )
    distiller._may_be_cut = True


@MODEL_WRAPPERS.register_module()
class DistributedDistiller(MMDistributedDataParallel):
    """A `Distiller` on several workers. Batch normalisation, where it uses the batch's statistics, uses the total batch's.

    Args:
        find_unused_parameters: for students that do not use all of their parameters in every step.
        device_ids: what mmengine's Runner thinks, which knows GPUs only; the module's own device is taken.
    """

    def __init__(self, module: nn.Module, find_unused_parameters: bool = False, device_ids: Any = None) -> None:
        share_batch_norm(module)
        device = next(module.parameters()).device
        super().__init__(
            module,
            device_ids=None if device.type == "cpu" else [device],
            broadcast_buffers=False,
            find_unused_parameters=find_unused_parameters,
        )

    def train_step(self, data: dict[str, Any], optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One optimiser step; see `take_step`."""
        return take_step(self, self.module, data, optim_wrapper)
