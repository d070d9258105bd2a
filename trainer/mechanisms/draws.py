"""Random draws that are a function of (seed, iteration, sample, purpose): of no worker, no batch-mates, no run before."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.task_modules.samplers import RandomSampler
from torch import nn

_begun: tuple[int, int] | None = None  # seed, iteration


def begin(seed: int, iteration: int) -> None:
    """Another training step. Before the first one draws are torch's own."""
    global _begun
    _begun = seed, iteration


def end() -> None:
    """No training any more."""
    global _begun
    _begun = None


def generator(samples: Sequence[Any], n: int, purpose: str, device: torch.device | str) -> torch.Generator | None:
    """What one sample draws with; None, torch's own, outside a training or where the sample does not say which it is.

    Args:
        samples: a batch's data samples, with ``img_id`` and ``view``.
        n: the place of the sample among them.
        purpose: makes draws of different kinds independent of each other.
    """
    seed = _seed(samples, n, purpose)
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def _seed(samples: Sequence[Any], n: int, purpose: str) -> int | None:
    if _begun is None or n >= len(samples) or "img_id" not in samples[n].metainfo:
        return None
    of = samples[n].metainfo
    text = f"{_begun[0]} {_begun[1]} {of['img_id']} {of.get('view', 0)} {purpose}"
    # 63 bits, which every kind of generator takes
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class SampledBoxes:
    """mmdet's `RandomSampler`s of a student, which choose boxes to learn from image by image, draw for each image by itself."""

    def __init__(self, student: nn.Module) -> None:
        self._samples: Sequence[Any] = ()
        self._calls: Counter[str] = Counter()
        for name, module in student.named_modules():
            for attribute in ("sampler", "bbox_sampler"):
                if isinstance(sampler := getattr(module, attribute, None), RandomSampler):
                    self._wrap(sampler, f"{name}.{attribute}")

    def begin(self, samples: Sequence[Any]) -> None:
        """A forward pass on these samples, in whose order the samplers are asked."""
        self._samples = samples
        self._calls.clear()

    def _wrap(self, sampler: RandomSampler, name: str) -> None:
        sample = sampler.sample

        def sample_by_image(*arguments: Any, **options: Any) -> Any:
            call = self._calls[name]
            self._calls[name] += 1
            # a second round is that of another loss on the same images
            turn, n = divmod(call, max(1, len(self._samples)))
            seed = _seed(self._samples, n, f"{name} {turn}")
            with _seeded(seed):
                return sample(*arguments, **options)

        sampler.sample = sample_by_image


@contextmanager
def _seeded(seed: int | None) -> Any:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):  # mmdet draws on the CPU
        torch.default_generator.manual_seed(seed)
        yield
