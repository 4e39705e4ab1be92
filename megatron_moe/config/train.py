"""Settings of the steps, of the optimizer and its schedules."""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.parts import PartName, Role
from megatron_moe.config.values import (
    Beta,
    Count,
    HomePath,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
)

OptimizerName = Literal["adam", "muon"]
StateDtype = Literal["fp32", "bf16"]
LoraTarget = Literal["attention", "experts"]


class Stage(Section):
    """Consecutive steps in which the same parameters are trained."""

    steps: Count | None = None
    """Number of optimizer steps. The last stage has none: it takes the rest of the run."""

    freeze: list[PartName] = []
    """Parts that this stage does not train, as in train.freeze."""


class BatchRamp(Section):
    """Growth of the global batch at the beginning of a run, as Megatron-LM's rampup_batch_size."""

    start: Count
    """Number of sequences of the first step."""

    increment: Count
    """Number of sequences by which the batch grows at a time."""

    samples: Count
    """Number of sequences over which the batch grows to global_batch_size, in equal parts."""


class Train(Section):
    """Number of steps, batch sizes, precision, recomputation, and what is trained."""

    steps: NonNegativeInt
    """Number of optimizer steps of the whole run. 0: upcycle, verify, save and stop."""

    micro_batch_size: Count = 1
    """Number of sequences that a model replica processes at once."""

    global_batch_size: Count = 1
    """Number of sequences per optimizer step over all replicas."""

    rampup_batch_size: BatchRamp | None = None
    """Begin with smaller batches. Schedules go on by steps, whatever their size."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: train in bfloat16 with fp32 master weights in the optimizer."""

    fp8: Literal["e4m3", "hybrid"] | None = None
    """Format of the products of linear layers and experts in fp8; weights, optimizer state and
    everything else stay in bf16. hybrid: E4M3, with E5M2 for gradients of outputs. Requires
    Transformer Engine and a GPU of compute capability 8.9 or newer. None: bf16 products."""

    fp8_recipe: Literal["tensorwise", "blockwise"] = "tensorwise"
    """Scaling factors with fp8, always those of the current values. tensorwise: one factor for a
    tensor. blockwise: one for each 128 x 128 block of weights and 128 activations (compute
    capability 9.0 and CUDA 12.9)."""

    recompute: Literal["none", "selective", "moe", "full"] = "none"
    """Parts that the backward pass recomputes instead of keeping in memory. selective: norms and
    expert activations, with Transformer Engine (on a CPU: core attention). moe: MoE layers and,
    with Transformer Engine, norms. full: every layer."""

    overlap_grad_reduce: bool = True
    """Reduce gradients over dp while the backward pass runs."""

    overlap_param_gather: bool = True
    """On CUDA, gather updated weights over dp while the next forward pass runs."""

    tp_comm_overlap: bool = False
    """Overlap tp communication with the matrix products that need it. Requires Transformer
    Engine."""

    overlap_moe_expert_parallel_comm: bool = False
    """Exchange tokens between ep ranks while another micro-batch is computed: the forward pass of
    one micro-batch and the backward pass of the one before run layer by layer, in turns. Needs ep,
    several micro-batches and, with pp, interleaved chunks. A CPU computes the same in this order,
    but overlaps nothing."""

    delay_wgrad_compute: bool = False
    """With overlap_moe_expert_parallel_comm, compute weight gradients after those of inputs, so
    that they overlap with the exchange too. Requires Transformer Engine."""

    gradient_accumulation_fusion: bool = True
    """Add weight gradients to their fp32 buffers inside the matrix products."""

    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32. false: in bf16, which halves the bytes of gradients
    and of their reduction, and rounds each sum over micro-batches and ranks to 8 bits. Only with
    precision bf16."""

    freeze: list[PartName] = []
    """Roles whose parameters are not trained: they have no gradients, no optimizer state and no
    reduction over dp. dense_ffn is the FFN of layers that stay dense, norms are all norms,
    embeddings include the output layer, adapters are those of lora. A frozen router keeps its
    expert biases too. attention@0-3 is the attention of layers 0 to 3 alone; layers are counted
    from 0."""

    stages: list[Stage] = []
    """Stages that train different parts, in order, instead of freeze. Between two stages the run
    saves a checkpoint and continues from it; parameters that a stage begins to train start with
    empty optimizer state."""

    def batch_size_after(self, samples: int) -> int:
        """Return the sequences of the step before which the run has consumed ``samples``."""
        ramp = self.rampup_batch_size
        if ramp is None or samples >= ramp.samples:
            return self.global_batch_size
        parts = (self.global_batch_size - ramp.start) // ramp.increment
        return ramp.start + ramp.increment * (samples * parts // ramp.samples)

    def stage_starts(self) -> list[int]:
        """Return the number of steps before each stage; a run without stages is one stage."""
        return [0, *accumulate(stage.steps or 0 for stage in self.stages[:-1])]

    def stage_end(self, step: int) -> int:
        """Return the step at which the stage ends that takes the step after ``step``."""
        later = (start for start in self.stage_starts() if start > step)
        return min(next(later, self.steps), self.steps)

    def freeze_after(self, step: int) -> list[PartName]:
        """Return the list ``freeze`` of the stage that takes the step after ``step``."""
        if not self.stages:
            return self.freeze
        current = sum(start <= step for start in self.stage_starts())
        return self.stages[current - 1].freeze


class Lora(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): train W + alpha / rank * B A instead of W.

    The weights of the targets are frozen. All other parts are trained as without adapters, unless
    train.freeze names them. Export adds the adapters to the weights.
    """

    rank: NonNegativeInt = 0
    """Rows of A and columns of B. 0: no adapters. B begins with zeros, so that the model of step 0
    is that without adapters. Query, key and value share A, and so do gate and up."""

    alpha: Positive = 32.0
    """Factor of the adapters' output, divided by rank."""

    targets: list[LoraTarget] = ["attention"]
    """Roles whose matrices get adapters. attention: query, key, value and output projections.
    experts: both matrices of each routed expert, with the torch engine and etp 1. To name the
    adapters in train.freeze or optimizer.lr_multipliers, use the role adapters."""

    @property
    def frozen(self) -> frozenset[Role]:
        """Roles that are frozen because adapters are trained in their place."""
        return frozenset(self.targets if self.rank else ())


class Optimizer(Section):
    """The optimizer and its schedules. Megatron-Core computes both."""

    optimizer: OptimizerName = "adam"
    """adam: AdamW. muon: Muon (arXiv 2502.16982) for matrices, each expert, query, key, value, gate
    and up on its own; AdamW for embeddings, the output layer, norms and biases."""

    muon_momentum: Beta = 0.95
    """Decay of the mean of gradients with muon, which looks one step ahead (Nesterov)."""

    muon_extra_scale_factor: Positive = 0.2
    """Factor on the updates of muon, besides sqrt(larger side of the matrix). The default gives
    them AdamW's usual root mean square, so that lr and weight_decay of AdamW can be kept (arXiv
    2502.16982, section 2.2)."""

    adam_beta1: Beta = 0.9
    """Decay of the mean of gradients. The default is LLaMA's (arXiv 2302.13971, section 2.3)."""

    adam_beta2: Beta = 0.95
    """Decay of the mean of squared gradients. The default is LLaMA's."""

    adam_eps: Positive = 1e-8
    """Term added to the denominator of an update, for numerical stability."""

    lr: Positive = 3e-5
    """Peak learning rate. The default is that of arXiv 2412.09952."""

    min_lr: NonNegative = 3e-7
    """Learning rate at the end of the decay and after it. Style constant does not use it."""

    warmup_steps: NonNegativeInt = 100
    """Number of linear warm-up steps."""

    lr_warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm up for this fraction of the decay length (rounded to steps) instead of
    warmup_steps."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Learning rate after the warm-up. constant: lr. linear, cosine: from lr to min_lr.
    inverse-square-root: lr * sqrt(warm-up steps / step), at least min_lr. WSD: lr, then a decay to
    min_lr over the last lr_wsd_decay_steps (warmup-stable-decay, arXiv 2404.06395)."""

    lr_decay_steps: Count | None = None
    """Step at which the decay ends. None: train.steps, so that a longer run decays more slowly. Set
    it if a run is to be extended later; steps after it keep min_lr."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Form of the decay at the end of style WSD. exponential: 2 * 0.5^x - 1 for x from 0 to 1.
    minus_sqrt: 1 - sqrt(x)."""

    lr_wsd_decay_steps: Count | None = None
    """Length of the decay at the end of style WSD, which requires it."""

    weight_decay: NonNegative = 0.1
    """Decoupled weight decay. Norms and biases have none."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """constant: weight_decay in every step. linear, cosine: from start_weight_decay to
    end_weight_decay, over the decay length of the learning rate."""

    start_weight_decay: NonNegative | None = None
    """Weight decay before the first step of an increase. Requires weight_decay_incr_style linear or
    cosine, as does end_weight_decay."""

    end_weight_decay: NonNegative | None = None
    """Weight decay at the end of an increase, and after it."""

    lr_multipliers: dict[PartName, Positive] = {}
    """Factors on the learning rate (lr and min_lr) of roles, such as router: 10, or of roles in
    some layers, such as attention@0-3: 0.5. Other parts have 1. To train a part not at all, see
    train.freeze."""

    weight_decay_multipliers: dict[PartName, NonNegative] = {}
    """Factors on the weight decay of the matrices of roles, as in lr_multipliers. Norms and biases
    have no weight decay with any factor."""

    clip_grad: Positive = 1.0
    """Global gradient norm above which gradients are scaled down."""

    exp_avg_dtype: StateDtype = "fp32"
    """Dtype in which adam keeps the mean of gradients between steps; a step computes in fp32. bf16
    takes 2 bytes less per parameter and rounds to 8 bits."""

    exp_avg_sq_dtype: StateDtype = "fp32"
    """Dtype in which adam keeps the mean of squared gradients, as exp_avg_dtype."""

    optimizer_cpu_offload: bool = False
    """Keep both means of adam in host memory. Each step copies those of one parameter after the
    other to the GPU and back, so results are the same to the last bit. Master weights stay on the
    GPU, which also computes the update (Megatron-Core's setting of this name uses the CPU)."""

    use_distributed_optimizer: bool = True
    """Shard optimizer state over dp (ZeRO-1; whole matrices with muon). false: every replica keeps
    all of it."""

    @property
    def moment_bytes(self) -> int:
        """Bytes of adam's two means of one parameter."""
        return sum(2 if d == "bf16" else 4 for d in (self.exp_avg_dtype, self.exp_avg_sq_dtype))

    @property
    def stores_moments_apart(self) -> bool:
        """Whether the means are not kept as the update computes them: in fp32, on its device."""
        return self.optimizer_cpu_offload or self.moment_bytes < 8

    def decay_length(self, steps: int) -> int:
        """Return the step at which the schedules end, in a run of ``steps`` steps."""
        return self.lr_decay_steps or steps

    def warmup_length(self, steps: int) -> int:
        """Return the number of warm-up steps, in a run of ``steps`` steps."""
        if self.lr_warmup_fraction is None:
            return self.warmup_steps
        return round(self.lr_warmup_fraction * self.decay_length(steps))


class Teacher(Section):
    """A frozen model that teaches while the run trains: the source, or a larger model.

    Without a weight there is no teacher.
    """

    path: HomePath | None = None
    """Hugging Face folder of the teacher, with the tokenizer of the source. It can teach logits
    only. None: the source itself."""

    logits_weight: NonNegative = 0.0
    """Weight in the loss of the divergence from the teacher's next-token distribution
    (Kullback-Leibler, nats per token). A usual weight is 1."""

    layers_weight: NonNegative = 0.0
    """Weight of the squared error of each MoE layer's output, relative to the output of the
    source's FFN on the same input. Mean over tokens and MoE layers."""

    router_weight: NonNegative = 0.0
    """Weight of the divergence of each router's softmax from what the experts' neurons contribute
    to the output of the source's FFN, with methods that split it. Mean over tokens and MoE
    layers."""

    temperature: Positive = 1.0
    """Temperature of both distributions of logits_weight, whose divergence is multiplied by its
    square (arXiv 1503.02531)."""

    steps: Count | None = None
    """Step after which the teacher is dropped and its memory is free. All weights fall to zero
    until then, linearly. None: constant weights for the whole run."""

    @property
    def teaches(self) -> bool:
        """Whether the run has a teacher at all."""
        return bool(self.logits_weight or self.teaches_layers)

    @property
    def teaches_layers(self) -> bool:
        """Whether the teacher's FFNs are compared with MoE layers."""
        return bool(self.layers_weight or self.router_weight)

    def factor_after(self, step: int) -> float:
        """Return the factor of the weights in the step after ``step``; 0 without a teacher."""
        if not self.teaches:
            return 0.0
        return 1.0 if self.steps is None else max(0.0, 1 - step / self.steps)
