"""Batch normalisation over all workers' shares, where a student trains with the statistics of its batches."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer import parts


def trains_on_batches(model: nn.Module) -> list[str]:
    """Names of the batch normalisations that use the statistics of the batch in training; frozen ones do not."""
    model.train()
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]


def share_batch_norm(model: nn.Module) -> nn.Module:
    """Let batch normalisations that use the batch's statistics use those of the total batch. Weights keep their names.

    On a GPU by torch's own ``SyncBatchNorm``; that does not run on a CPU, where `SharedBatchNorm` does.
    """
    cuda = next(model.parameters()).is_cuda
    for name in trains_on_batches(model):
        place, _, own = name.rpartition(".")
        old = model.get_submodule(name)
        new = nn.SyncBatchNorm.convert_sync_batchnorm(old) if cuda else SharedBatchNorm.of(old)
        setattr(model.get_submodule(place), own, new)
    return model


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of (N, C, H, W) by the moments over all parts of a step."""

    @classmethod
    def of(cls, norm: nn.Module) -> "SharedBatchNorm":
        """With the parameters and buffers of another one: they are its own, not copies."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new._parameters, new._buffers = norm._parameters, norm._buffers
        return new.train(norm.training)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W), as the maps."""
        if not self.training or parts.count() == 1:
            return super().forward(maps)
        # as torch's own under autocast
        values = maps.float()
        own = values.mean(dim=(0, 2, 3))
        squares = (values - own[:, None, None]).square().sum(dim=(0, 2, 3))
        number = torch.tensor(float(values.numel() // values.shape[1]))
        count, mean, variance = parts.combined(number, own, squares, lambda sums: parts.joint(sums, "BatchNorm"))
        if self.track_running_stats:
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / (count - 1), share)
        normed = (values - mean[:, None, None]) * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            normed = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return normed.to(maps.dtype)
