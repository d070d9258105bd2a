"""Sums over the parts of a step's total batch, so that a step does not depend on how many parts there are.

A part is what one forward pass sees: a worker's share, or one of the micro-batches into which it is cut. Each part's loss is its
*addend* of the loss of the whole batch: sums over its own samples, divided by what is summed over all parts. Gradients of the
parts are then added up, never averaged.

- `whole` sums a normaliser: a number of positives, of positions, of images. No gradient passes.
- `agreed` sums what a loss is computed from in the same way by every part: moments, squares of a norm. Its gradient is that of
  the part's own addend, without communication.
- `joint` sums what every part goes on with in its own way, such as the moments of a batch normalisation. Its gradient is summed
  over the parts too, which micro-batches cannot do: they come one after the other.

With one part all of them return what they are given. With micro-batches a first pass without gradients (`recording`) adds up what
`whole` and `agreed` are given, call by call, so that in the second (`replaying`) every micro-batch has the sums of all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import Tensor
from torch import distributed as dist

from cache import RecipeError


class _Step:
    """How the total batch at hand is cut.

    Attributes:
        parts: of all workers together.
        samples: of the total batch; None where only this process' own are known.
        recorded: of the micro-batches so far, by call; None outside a first pass.
        known: the sums of all parts, by call; None outside a second pass.
        call: number of the next call of a micro-batch.
    """

    def __init__(self, parts: int, samples: int | None = None) -> None:
        self.parts, self.samples, self.call = parts, samples, 0
        self.recorded: list[Tensor] | None = None
        self.known: list[Tensor] | None = None


_step: _Step | None = None


@contextmanager
def cut(parts: int, samples: int) -> Iterator[None]:
    """A step whose total batch of ``samples`` is cut into so many parts."""
    global _step
    before, _step = _step, _Step(parts, samples)
    try:
        yield
    finally:
        _step = before


def count() -> int:
    """The number of parts. Outside a step every process is one."""
    return get_world_size() if _step is None else _step.parts


def images(own: int) -> int:
    """Samples of the total batch, for a part that has ``own`` of them."""
    return own if _step is None or _step.samples is None or _step.parts == 1 else _step.samples


def whole(values: Tensor) -> Tensor:
    """The sum over parts of a normaliser, of any shape; no gradient passes."""
    return values if count() == 1 else _sum(values.detach())


def agreed(values: Tensor) -> Tensor:
    """The sum over parts of what a loss is computed from in the same way by all; divide that loss by `count`.

    Args:
        values: of any shape and a floating dtype.
    """
    return values if count() == 1 else _Agreed.apply(values)


def joint(values: Tensor, what: str) -> Tensor:
    """The sum over parts, gradients included.

    Args:
        values: of any shape and a floating dtype.
        what: needs it, for the error.

    Raises:
        RecipeError: the share is cut into micro-batches.
    """
    if count() == 1:
        return values
    if _step is not None and (_step.recorded is not None or _step.known is not None):
        raise RecipeError(
            f"training.micro_batch: {what} relates all samples of a step to each other, which micro-batches that come one after "
            "the other cannot do. Leave micro_batch out, and take a smaller training.batch_size or more workers."
        )
    return _Joint.apply(values)


@contextmanager
def recording() -> Iterator[None]:
    """The first pass of a step in micro-batches; begin each with `next_micro_batch`."""
    assert _step is not None
    _step.recorded = []
    yield
    recorded, _step.recorded = _step.recorded, None
    flat = torch.cat([values.flatten().double() for values in recorded]) if recorded else None
    if flat is not None and get_world_size() > 1:
        dist.all_reduce(flat)
    pieces = flat.split([values.numel() for values in recorded]) if flat is not None else ()
    _step.known = [piece.view(values.shape).to(values.dtype) for piece, values in zip(pieces, recorded, strict=True)]


def next_micro_batch() -> None:
    """The calls of another micro-batch begin."""
    if _step is not None:
        _step.call = 0


def combined(
    count: Tensor, mean: Tensor, squares: Tensor, total: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments over all parts, out of each part's own.

    Args:
        count: scalar, what the part's moments are over.
        mean: of any shape.
        squares: sums of squared differences from ``mean``, of its shape.
        total: `whole`, `agreed` or `joint`.

    Returns:
        Count, mean and biased variance over all parts.
    """
    # by each part's own mean, and in double, so that large means do not drown small variances
    n, own = count.double(), mean.double()
    sums = torch.cat([n.reshape(1), (n * own).flatten(), (squares.double() + n * own.square()).flatten()])
    all_n, first, second = total(sums).split([1, mean.numel(), mean.numel()])
    middle = first / all_n
    variance = (second / all_n - middle.square()).clamp(min=0)
    return all_n[0].to(mean.dtype), middle.view_as(mean).to(mean.dtype), variance.view_as(mean).to(mean.dtype)


def widest(size: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) that any worker has."""
    if get_world_size() == 1:
        return size
    both = torch.tensor(size)
    # by the CPUs: the GPU need not be waited for
    dist.all_reduce(both, dist.ReduceOp.MAX, group=_host_group())
    return int(both[0]), int(both[1])


_host: tuple[Any, Any] | None = None


def _host_group() -> Any:
    """A group of all workers that talks from CPU to CPU."""
    global _host
    if dist.get_backend() == "gloo":
        return None
    if _host is None or _host[0] is not dist.group.WORLD:
        _host = dist.group.WORLD, dist.new_group(backend="gloo")
    return _host[1]


def _sum(values: Tensor) -> Tensor:
    if _step is not None and _step.known is not None:
        _step.call += 1
        return _step.known[_step.call - 1].to(values.device)
    if _step is not None and _step.recorded is not None:
        if _step.call == len(_step.recorded):
            _step.recorded.append(torch.zeros_like(values))
        _step.recorded[_step.call] += values
        _step.call += 1
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


class _Agreed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.parts = count()
        return _sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # the loss was divided by the number of parts, each of which brings the gradient of its own addend alone
        return gradient * ctx.parts


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
