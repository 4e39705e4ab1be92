"""A frozen model that teaches: what it adds to the loss of a step.

Logits: before a step, the teacher passes over the step's micro-batches once, forward only, through
its own pipeline. Only its last hidden states are kept; the last stage computes the teacher's logits
from them when it computes those of the model. Layers and routers: the FFN of each teacher's layer
runs on what the MoE layer gets, on the same ranks, inside the model's own pass.

Shape letters of this module:

    s  positions of this rank    B  micro_batch_size    D  hidden_size
    S  positions of its tp group         V  this tp rank's part of the vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batches import Batch
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.model.build import Model
from megatron_moe.model.distillation import (
    Vocabulary,
    taught_cross_entropy,
    toward_output,
    toward_shares,
)
from megatron_moe.model.routers import routers_in
from megatron_moe.model.teacher_ffn import TeacherFfn
from megatron_moe.train.inputs import model_inputs, on_device

LOSSES = ("logits", "layers", "router")
"""What the losses of a teacher compare, in the order of the settings."""


@dataclass(slots=True)
class Teacher:
    """The teacher's part on this rank, and the model that it teaches."""

    model: Model
    """The teacher, frozen."""
    config: RunConfig
    """The run's configuration."""
    groups: ProcessGroupCollection
    plan: ExpertPlan
    """Construction of the model's experts, whose neurons are the teacher's."""
    factor: float = 1.0
    """Factor of all weights in this step."""
    tokens: int = 1
    """Tokens of this step's global batch."""
    sums_3: Tensor = field(init=False)
    """Sums of this step's `LOSSES` on this rank, over tokens and, but for logits, MoE layers."""
    _student: Model | None = None
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for module in self.model.modules:
            module.eval().requires_grad_(False)
        self.sums_3 = torch.zeros(3, dtype=torch.float64, device=self.model.device)

    def start_step(self, student: Model, *, step: int, sequences: int) -> None:
        """Prepare for the step after ``step``, over this number of sequences on all ranks."""
        settings = self.config.teacher
        self.factor = settings.factor_after(step)
        self.tokens = sequences * self.config.data.seq_length
        if settings.teaches_layers and self._student is not student:
            self._attach(student)

    def lessons(self, batches: list[Batch]) -> list[Lesson] | None:
        """Run the teacher over the micro-batches of a step, before the model does.

        Returns:
            One lesson per micro-batch, on the last stage if the teacher teaches logits, else None.
        """
        self.sums_3.zero_()
        if not self.config.teacher.logits_weight:
            return None
        hidden = self.hidden_states(batches)
        return [Lesson(self, hidden_sBD) for hidden_sBD in hidden] or None

    def losses(self, *, counted: int) -> dict[str, float]:
        """Return the means of this step's losses over all ranks, for those with a weight.

        Args:
            counted: Tokens of the global batch whose loss counts, which the logits' loss is a mean
                over; the others are means over all tokens and MoE layers.
        """
        dist.all_reduce(self.sums_3)
        layers = self.tokens * max(len(self.plan.recipe.moe_layers), 1)
        sizes, settings = (counted, layers, layers), self.config.teacher
        return {
            name: total / size
            for name, total, size in zip(LOSSES, self.sums_3.tolist(), sizes, strict=True)
            if getattr(settings, f"{name}_weight")
        }

    @torch.no_grad()
    def hidden_states(self, batches: list[Batch]) -> list[Tensor]:
        """Return the last hidden states of each micro-batch, ``(s, B, D)``, on the last stage.

        With sequence parallelism, s is this tp rank's part. Other stages return an empty list.
        """
        modules = self.model.modules
        iterators = [iter(batches) for _ in modules]

        def forward_step(some: Iterator[Batch], module: Any) -> tuple[Tensor, Any]:
            batch = on_device(next(some), self.model)
            inputs = model_inputs(batch, self.config.data, self.model)
            return module(**inputs, output_processor=_last_hidden), _keep

        schedule: Any = get_forward_backward_func()
        return schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(modules) > 1 else iterators[0],
            model=modules if len(modules) > 1 else modules[0],
            num_microbatches=len(batches),
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )

    @torch.no_grad()
    def logits(self, hidden_sBD: Tensor) -> Tensor:
        """Return the logits of the last stage, ``(S, B, V)``, V this tp rank's tokens."""
        module = self.model.modules[-1]
        weight = None
        if module.share_embeddings_and_output_weights:
            weight = module.shared_embedding_or_output_weight()
        return module.output_layer(hidden_sBD, weight=weight)[0]

    def weight_of_token(self, weight: float) -> float:
        """Return a weight as a factor of each token's loss in each MoE layer.

        Nothing divides these gradients later, so the mean is taken here.
        """
        return self.factor * weight / (self.tokens * len(self.plan.recipe.moe_layers))

    def release(self) -> None:
        """Stop teaching: remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for router in routers_in(*self._student.modules) if self._student is not None else ():
            router.guide = None
        self._student = None

    def _attach(self, student: Model) -> None:
        """Register hooks on the MoE layers of a model whose pipeline stages are the teacher's."""
        self.release()
        self._student = student
        for own, chunk in zip(self.model.chunks, student.chunks, strict=True):
            assert own.layers == chunk.layers
            dense: Any = own.module.decoder
            routed: Any = chunk.module.decoder
            for layer, source, block in zip(chunk.layers, dense.layers, routed.layers, strict=True):
                if isinstance(block.mlp, MoELayer):
                    fc1, fc2 = source.mlp.linear_fc1.weight, source.mlp.linear_fc2.weight
                    ffn = TeacherFfn(fc1, fc2, self.plan.layer(layer), self.groups.tp)
                    self._attach_layer(block.mlp, ffn)

    def _attach_layer(self, moe: Any, ffn: TeacherFfn) -> None:
        if self.config.teacher.layers_weight:
            self._handles.append(moe.register_forward_pre_hook(ffn.expect))
            self._handles.append(moe.register_forward_hook(_LayerHook(self, ffn)))
        if self.config.teacher.router_weight:
            moe.router.guide = _RouterGuide(self, ffn)
            self._handles.append(
                moe.router.register_forward_pre_hook(moe.router.guide.remember_input)
            )


@dataclass(slots=True)
class Lesson:
    """The teacher's hidden states of one micro-batch, on the last stage; used once."""

    teacher: Teacher
    hidden_sBD: Tensor | None

    def process(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Callable[..., tuple[Tensor, None]],
        output_weight: Tensor | None,
        labels: Tensor,
        **_: Any,
    ) -> Tensor:
        """Return the cross entropy of each token and its divergence, fp32 ``(2, B, S)``.

        An output processor of Megatron-Core, like those of `make_output_processor`.
        """
        assert self.hidden_sBD is not None
        teacher_SBV, self.hidden_sBD = self.teacher.logits(self.hidden_sBD), None
        logits_SBV, _bias = output_layer(hidden_states, weight=output_weight)
        width, tp_group = logits_SBV.shape[-1], self.teacher.groups.tp
        vocab_size = self.teacher.model.spec.vocab_size
        real = min(max(vocab_size - tp_group.rank() * width, 0), width)
        losses = taught_cross_entropy(
            logits_SBV.flatten(0, 1),
            teacher_SBV.flatten(0, 1),
            labels.transpose(0, 1).flatten(),
            temperature=self.teacher.config.teacher.temperature,
            vocabulary=Vocabulary(real, tp_group),
        )
        return torch.stack([loss_N.view(logits_SBV.shape[:2]).T for loss_N in losses])

    def loss(self, loss_mask_BS: Tensor, losses_2BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `train.step` asks of a loss function; the teacher keeps its own sum."""
        loss, divergence = (losses_2BS * loss_mask_BS).sum(dim=(1, 2))
        if self.teacher.model.tp_rank == 0:  # all tp ranks have the same
            self.teacher.sums_3[0] += divergence.detach()
        weight = self.teacher.factor * self.teacher.config.teacher.logits_weight
        tokens = loss_mask_BS.sum()
        total = loss + weight * divergence
        return total, tokens.int(), torch.stack([loss.detach(), tokens])


@dataclass(frozen=True, slots=True)
class _LayerHook:
    """Forward hook of a MoE layer, which pulls its output toward that of the teacher's FFN."""

    teacher: Teacher
    ffn: TeacherFfn

    def __call__(self, module: Any, inputs: tuple[Any, ...], outputs: Any) -> Any:
        # Without a graph this is an evaluation, or the first pass of a layer that is recomputed.
        if module.training and torch.is_grad_enabled():
            weight = self.teacher.weight_of_token(self.teacher.config.teacher.layers_weight)
            target_sBD = self.ffn.output(inputs[0])
            output_sBD, error_sB = toward_output(outputs[0], target_sBD, weight)
            self.teacher.sums_3[1] += error_sB.sum()
            outputs = output_sBD, *outputs[1:]
        self.ffn.forget()
        return outputs


@dataclass(slots=True)
class _RouterGuide:
    """Guide of a router, which pulls its softmax toward the shares of the experts."""

    teacher: Teacher
    ffn: TeacherFfn
    _input_sBD: Tensor | None = None

    def remember_input(self, _: Any, inputs: tuple[Any, ...]) -> None:
        self._input_sBD = inputs[0]

    def __call__(self, logits: Tensor) -> Tensor:
        assert self._input_sBD is not None, "the router's hook comes before its routing"
        share_sBE, self._input_sBD = self.ffn.shares(self._input_sBD), None
        weight = self.teacher.weight_of_token(self.teacher.config.teacher.router_weight)
        logits, divergence = toward_shares(logits, share_sBE.view(logits.shape), weight)
        self.teacher.sums_3[2] += divergence.sum()
        return logits


def _last_hidden(*, hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states


def _keep(hidden_sBD: Tensor, *, non_loss_data: bool) -> Tensor:
    return hidden_sBD
