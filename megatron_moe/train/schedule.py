"""Make the schedules of learning rate and weight decay: Megatron-Core's, functions of the step."""

from __future__ import annotations

from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe.config.run import RunConfig


def make_schedule(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return the schedule of a run before its first step.

    Nothing of it is saved: it is a function of the step and of the settings. A resumed run
    therefore follows the settings that it is resumed with.
    """
    settings = config.optimizer
    warmup = settings.warmup_length(config.train.steps)
    # A run of 0 steps needs a schedule too.
    length = settings.decay_length(config.train.steps) or warmup + 1
    start, end = settings.start_weight_decay, settings.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=length,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay if start is None else start,
        end_wd=settings.weight_decay if end is None else end,
        wd_incr_steps=length,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=settings.lr_wsd_decay_steps,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )
