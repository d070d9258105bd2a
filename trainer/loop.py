"""A stage's training, step by step: where it begins again after a kill, what it draws, when it leaves a checkpoint."""

from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner

from trainer.finite import refuse_not_finite
from trainer.mechanisms import draws

# losses come to the CPU with every step, weights only to be looked at
_LOOK_STEPS = 50


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop, which goes on in the midst of an epoch where its checkpoint is from there.

    The loader's batch sampler is a `TotalBatchSampler`.
    """

    def run_epoch(self) -> None:
        """The rest of an epoch; nothing is left of one whose checkpoint is from its end but what comes behind it."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        self.dataloader.batch_sampler.skip = done
        for number, batch in enumerate(self.dataloader, start=done):
            self.run_iter(number, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


@HOOKS.register_module()
class SeedStepHook(Hook):
    """Seed what is drawn in each step, so that a resumed stage draws what an undisturbed one draws.

    Mechanisms and samplers of boxes draw for each sample by itself, the same on whichever worker it is; what else there is
    (dropout) draws by torch's own generator, which is seeded for each worker.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Before each step."""
        draws.begin(self.seed, runner.iter)
        torch.manual_seed((self.seed * 1_000_003 + runner.iter) * 1_009 + runner.rank)

    def after_train(self, runner: Runner) -> None:
        """Behind the last step."""
        draws.end()


@HOOKS.register_module()
class StageCheckpointHook(CheckpointHook):
    """A checkpoint at the end of each epoch, and within it every so many steps; the last two are kept.

    Two, because mmengine deletes what is too many before it writes, and a kill may cut short what it writes. Before each one,
    and now and then between, the weights are looked at: see `refuse_not_finite`.

    Args:
        steps: between checkpoints, counted from the stage's beginning.
    """

    def __init__(self, steps: int | None = None) -> None:
        super().__init__(by_epoch=False, max_keep_ckpts=2, save_last=False)
        self.steps = steps
        self._looked = 0

    def before_train(self, runner: Runner) -> None:
        """Where a stage goes on, what was written is finite."""
        super().before_train(runner)
        self._looked = runner.iter

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write ``iter_N.pth``, N the number of steps that are done.

        Raises:
            RecipeError: the weights are not finite.
        """
        done = runner.iter + 1
        due = done % len(runner.train_dataloader) == 0 or (self.steps is not None and done % self.steps == 0)
        if due or done % _LOOK_STEPS == 0:
            refuse_not_finite(runner, self._looked)
            self._looked = done
        if due:
            self._save_checkpoint(runner)
