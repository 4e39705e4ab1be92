"""All settings of a run. Read this file first; each stage takes only its own section.

A setting that is passed to Megatron-Core unchanged keeps Megatron-Core's name, so a search finds it
in both code bases. A setting that we compute with first has a name of ours. Rules that need more
than one section (does tp divide the heads? does the world size fit the layout?) are checked by
``rules/check.py``, which also sees the dense model and the world size.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _expanded(path: Path) -> Path:
    """Return the path with ``~`` and ``~user`` replaced by a home directory."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"a path whose home directory is known: {error}") from error


HomePath = Annotated[Path, AfterValidator(_expanded)]
Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

Method = Literal[
    "copy",
    "drop",
    "granular",
    "split_random",
    "split_clustered",
    "split_coactivation",
    "sharing_inner",
    "sharing_inter",
    "qwen",
    "weaver",
    "mix",
    "keep",
    "grow",
    "prune",
]
Role = Literal[
    "router", "experts", "shared_experts", "dense_ffn", "attention", "norms", "embeddings"
]
"""Part of the model that settings name: every parameter has one role."""
OptimizerName = Literal["adam", "muon"]
RouterGate = Literal["linear", "noisy_linear", "noisy_mlp"]
RouterInit = Literal["normal", "uniform", "zero", "gate_mean", "virtual_groups", "centroids"]


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys and silent type conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True
    )


class Run(Section):
    """Location, seed, device and engine of the run."""

    dir: HomePath
    """Run directory: config.yaml, receipt.json, metrics.jsonl, checkpoints/."""

    seed: NonNegativeInt = 0
    """Seed of the data order. Weights do not depend on it; see upcycle.seed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if torch sees a GPU for every local rank, otherwise the CPU. The log names the
    device that was chosen."""

    engine: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Implementation of the layers. auto: Transformer Engine on CUDA if a supported version is
    installed, otherwise torch. Both read and write the same checkpoints."""


class Source(Section):
    """The model that the run starts from."""

    path: HomePath
    """Hugging Face folder of a dense or MoE model: config.json, safetensors files and tokenizer
    files. A torch_dist checkpoint of Megatron-Core may take the place of the safetensors files."""


class Moe(Section):
    """Shape and router of the Mixture-of-Experts (MoE) layers.

    With a MoE source, settings that are left out are those of the source; see docs/growing.md.
    """

    num_moe_experts: Count
    """Number of experts per MoE layer (E)."""

    moe_router_topk: Count = 2
    """Number of experts that each token is routed to (K)."""

    moe_ffn_hidden_size: Count | None = None
    """Number of neurons per expert (M). None: as many as the dense FFN has."""

    router_order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """topk_softmax (Mixtral): take the softmax over the K chosen experts only, so that K equal
    copies reproduce the dense layer. softmax_topk: take it over all E experts and do not
    renormalize."""

    moe_layers: Literal["all"] | list[NonNegativeInt] = "all"
    """Ids of the layers that become MoE layers, counted from 0. The other layers stay dense."""

    first_dense_layers: NonNegativeInt = 0
    """Number of initial layers that stay dense. Requires moe_layers "all"."""

    last_dense_layers: NonNegativeInt = 0
    """Number of final layers that stay dense. Requires moe_layers "all"."""

    moe_shared_expert_intermediate_size: Count | None = None
    """Number of neurons of the shared expert (S), which processes every token in addition to the
    routed experts. None: no shared expert."""

    moe_shared_expert_gate: bool = False
    """Multiply the shared expert's output by the sigmoid of a learned row (Qwen2-MoE). Only for a
    MoE source that has it."""

    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """sigmoid (DeepSeek-V3): score each expert independently and divide the scores of the K chosen
    experts by their sum."""

    router_gate: RouterGate = "linear"
    """noisy_linear, noisy_mlp (LLaMA-MoE): add learned noise to the logits during training. The
    gate is one linear layer, or linear, tanh, linear."""

    moe_router_load_balancing_type: Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "cv_squared", "none"
    ] = "aux_loss"
    """Tokens over which the load-balancing loss is computed: a micro-batch (aux_loss, arXiv
    2101.03961), one sequence (seq_aux_loss), or all micro-batches of the global batch so far
    (global_aux_loss, arXiv 2501.11873). cv_squared: the noisy gate's own loss, the squared
    coefficient of variation of importance and load over a micro-batch."""

    moe_aux_loss_coeff: NonNegative = 1e-2
    """Weight of each layer's load-balancing loss."""

    moe_z_loss_coeff: NonNegative = 0.0
    """Weight of the router's z-loss (arXiv 2202.08906), which keeps its logits small."""

    moe_router_enable_expert_bias: bool = False
    """Balance the load without a loss (arXiv 2408.15664): a bias per expert affects only which
    experts are chosen, and moves against the expert's load after each step. Requires
    moe_router_score_function sigmoid."""

    moe_router_bias_update_rate: Positive = 1e-3
    """Change of an expert's bias per step."""

    moe_expert_capacity_factor: Positive | None = None
    """Upper bound on the tokens per expert, as a multiple of the mean (see capacity_formula). None:
    no token is dropped."""

    capacity_formula: Literal["megatron", "tokens_per_expert"] = "megatron"
    """megatron: ceil(tokens * K / E * factor). tokens_per_expert: ceil(tokens / E * factor), as in
    arXiv 2412.09952, so its factor 4 with K = 2 equals Megatron-Core's 2."""

    capacity_scope: Literal["rank", "sequence"] = "rank"
    """Tokens among which the ones to drop are chosen. rank: those of one rank, which depends on tp
    and cp and costs nothing. sequence: whole sequences of the micro-batch, which does not depend on
    the layout and costs an all-gather."""

    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Choices to drop first: the least probable, or the last ones in the sequence."""

    moe_pad_expert_input_to_capacity: bool = False
    """Pad every expert's input with zeros to exactly its capacity."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """Exchange of tokens between ranks. flex: the kernels of DeepEP or HybridEP, on CUDA only."""

    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = "deepep"
    """Package whose kernels the flex dispatcher uses; it must be installed."""

    @property
    def megatron_capacity_factor(self) -> float | None:
        """The factor that means the same in Megatron-Core's formula, ceil(tokens * K / E * it)."""
        factor = self.moe_expert_capacity_factor
        if factor is None or self.capacity_formula == "megatron":
            return factor
        return factor / self.moe_router_topk

    def expert_size(self, dense_size: int) -> int:
        """Return the number of neurons of one expert (M), for a dense FFN of ``dense_size``."""
        return self.moe_ffn_hidden_size or dense_size

    @property
    def shared_size(self) -> int:
        """Number of neurons of the shared expert (S), 0 without one."""
        return self.moe_shared_expert_intermediate_size or 0


class Upcycle(Section):
    """Construction of experts from the dense FFN of F neurons, or from the experts of a MoE."""

    method: Method = "copy"
    """Which dense neurons each expert of M neurons consists of. The last three are for MoE sources.

    copy             all of them (arXiv 2412.09952, 2212.05055)
    drop             all of them, some redrawn at random (Drop-Upcycling, 2502.19261)
    granular         one of G = F / M shards, in R = E / G replicas (virtual groups, 2410.07524)
    split_random     one part of a random partition (LLaMA-MoE, 2406.16554)
    split_clustered  one cluster of similar rows of up, all of equal size (LLaMA-MoE)
    split_coactivation  one cluster of neurons that contribute to the same tokens; a shared expert
                     gets those that most tokens use (needs a plan)
    sharing_inner    the M most important ones for one part of the text (LLaMA-MoE; needs a plan)
    sharing_inter    as sharing_inner, after the neurons that most experts want have moved to the
                     shared expert (LLaMA-MoE; needs a plan)
    qwen             one piece of shuffled copies, half of it redrawn (Qwen1.5-MoE)
    weaver           one cluster of similar activations; evenly active neurons are shared
                     (2602.15521; needs a plan)
    mix              all of them, from one of several dense models (Branch-Train-MiX, 2403.07816)
    keep             the expert of the MoE source, unchanged
    grow             an expert of the MoE source, several times (Expert Upcycling, 2604.19835)
    prune            an expert of the MoE source, some of which are left out (REAP, 2510.13999)
    """

    twins: Literal["noise", "bias", "exact"] | None = None
    """Difference between the copies of an expert with method grow. noise (also None): noise on the
    weights and router rows of all but the first copy. bias: equal weights; the router adds the same
    random row to the first copies of all experts, and another to the second ones. exact: none, and
    top-k grows with the number of copies, so that the output is that of the source."""

    choose: Literal["even", "load", "utility", "reap"] | None = None
    """Which experts of a MoE source to copy or keep. even (default for grow): copy all equally
    often, or keep experts at equal distances. load: those that most tokens choose. utility: those
    whose weights matter most to the loss. reap (default for prune): those with the largest mean of
    combine weight times output norm. All but even need a plan."""

    plan: HomePath | None = None
    """Plan file, written by `megatron-moe construct` and read by `train`. Required if the method,
    the router or the scale is measured on text."""

    mix_with: list[HomePath] = []
    """Dense checkpoints that method mix uses besides source.path. Experts come from source.path and
    these in turn; all other weights are averaged."""

    seed: NonNegativeInt = 0
    """Seed of everything that the method draws at random, including router rows."""

    permutation_seed: NonNegativeInt | None = None
    """Seed of the order in which copies and shards take the dense neurons. None: the original
    order."""

    reinit_ratio: Fraction | None = None
    """Fraction of each expert's neurons that is redrawn, with the mean and standard deviation of
    what it replaces, on top of any method. None: 0.5 for drop and qwen, otherwise 0."""

    noise_std: NonNegative | None = None
    """Standard deviation of noise that is added to the weights of routed experts, so that copies
    differ. None: 0.001 with twins noise, otherwise 0."""

    scale: Literal["exact", "paper", "calibrated", "none"] | None = None
    """Restore the magnitude of the dense output with method granular. exact (also None):
    multiply down by the factor. paper: multiply gate, up and down by its cube root. calibrated:
    measure the factor."""

    rescale: Literal["N/K", "N", "none", "calibrated"] | None = None
    """Factor of the routed output for all other methods, with N experts of which K are chosen.
    None: N/K if experts are parts of the dense layer (LLaMA-MoE), otherwise none."""

    rescale_at: Literal["weights", "runtime"] = "weights"
    """weights: multiply down once. runtime: multiply the experts' output in every pass."""

    router_init: RouterInit | None = None
    """Initial router rows. None: virtual_groups for granular, uniform for drop, gate_mean for
    weaver, otherwise normal. normal, uniform: random, of standard deviation router_init_std. zero:
    near-zero random rows, so that top-k has no ties. gate_mean: the mean of the expert's gate rows.
    virtual_groups: random rows, each repeated so that all shards of a replica are chosen together.
    centroids: k-means centroids of the layer's inputs (needs a plan)."""

    fit: list[Literal["router", "down"]] = []
    """Parts of split experts that `megatron-moe construct` solves for on text (needs a plan).
    router: a regression on what each expert would contribute. down: the least-squares solution for
    the dense layer's output, over all experts of a layer at once."""

    max_load: Annotated[float, Field(ge=1)] = 1.5
    """Bound on the load of the busiest expert with fit router, in multiples of the mean. A higher
    bound gives a lower loss before the first step, and experts that are used less evenly."""

    fit_stream: Fraction = 0.0
    """Share of the dense model's residual stream in the target of fit down. 0: the dense layer's
    output on the same input. 1: what brings the stream back to the dense model's."""

    router_init_std: NonNegative = 0.02
    """Standard deviation of random router rows."""

    verify: Literal["auto", "always", "never"] = "auto"
    """Compare logits with the dense model after upcycling. auto: for up to 1e9 dense parameters."""


class Measure(Section):
    """Size of the measurement by `megatron-moe construct`."""

    samples: Count = 256
    """Number of training sequences to measure on. Must be a multiple of moe.num_moe_experts,
    because they are divided into clusters of equal size."""

    hidden_states: Count = 4096
    """Number of inputs per layer that are kept for router centroids and calibrated scales."""

    interval: Count = 16
    """Save measurements after this many rounds (a round is one sequence per replica and stage), so
    that an interrupted run can resume."""


class Parallel(Section):
    """Degrees of parallelism. dp and edp follow from the world size, so they are not set."""

    tensor_parallel_size: Count = 1
    """Number of ranks that share the heads of an attention layer (tp)."""

    context_parallel_size: Count = 1
    """Number of ranks that share a sequence (cp)."""

    pipeline_parallel_size: Count = 1
    """Number of pipeline stages, each a run of consecutive layers (pp)."""

    virtual_pipeline_parallel_size: Count | None = None
    """Number of interleaved model chunks per pipeline rank (vpp). None or 1: one."""

    num_layers_in_first_pipeline_stage: Count | None = None
    """Number of layers of the first pipeline stage. Set it, or the next one, if the stages cannot
    be equally large, or to give a stage less work. None: as many as any other stage."""

    num_layers_in_last_pipeline_stage: Count | None = None
    """Number of layers of the last pipeline stage, which also computes logits and loss. None: as
    many as any other stage."""

    expert_parallel_size: Count = 1
    """Number of ranks that share the experts of a layer; each holds whole experts (ep)."""

    expert_tensor_parallel_size: Count = 1
    """Number of ranks that share the neurons of an expert (etp)."""


class Domain(Section):
    """One named domain of a data mixture."""

    path: HomePath
    """The domain's text, in the formats of data.path."""

    weight: NonNegative | None = None
    """Fraction of the samples if data.mixing.weights is given. The weights of all domains sum to
    1."""

    validation_path: HomePath | None = None
    """The domain's held-out text. Alternatively, set data.validation_fraction for all domains."""


class Mixing(Section):
    """Domain weights of the data mixture, and how they adapt."""

    weights: Literal["given", "llama", "sheared"] = "given"
    """Initial domain weights. given: data.domains.*.weight. llama, sheared: the published weights
    for the seven domains of SlimPajama (LLaMA-MoE, arXiv 2406.16554): commoncrawl, c4, github,
    wikipedia, books, arxiv, stackexchange."""

    update: Literal["never", "sheared_llama", "doremi"] = "never"
    """never: keep the weights. sheared_llama: increase the weights of domains whose held-out loss
    is above the reference and decrease the others (arXiv 2310.06694, algorithm 1). doremi: the same
    without clamping the excess loss at zero."""

    interval: Count = 100_000_000
    """Number of tokens between weight updates; at least those of one step. LLaMA-MoE uses 5e9."""

    reference_losses: HomePath | None = None
    """File written by `megatron-moe reference-loss`, or a JSON object {domain: nats per token}."""

    step_size: Positive = 1.0
    """Factor on the excess loss: a domain one nat above its reference gains a factor
    exp(step_size)."""

    floor: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """Fraction of the weight that is spread evenly at every update, so that no domain
    disappears."""


class Data(Section):
    """Training and held-out text."""

    path: HomePath | None = None
    """A text or JSONL file, a folder of such files, or the prefix of a Megatron .bin/.idx pair."""

    domains: dict[str, Domain] | None = None
    """Several named texts with weights, instead of path."""

    mixing: Mixing = Mixing()
    """Weights of the domains."""

    kind: Literal["text", "chat"] = "text"
    """text: compute the loss on every token. chat: conversations (messages or ShareGPT, one per
    line) in the tokenizer's chat template, packed without being split; the loss covers only what
    assistants say."""

    seq_length: Count = 2048
    """Number of tokens per training sequence."""

    reset_attention: bool = False
    """Prevent tokens from attending to earlier documents or conversations in the same sequence."""

    validation_path: HomePath | None = None
    """Held-out text, in the formats of path. Its loss is logged before the first step and at every
    checkpoint."""

    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this fraction of each text instead: its last documents, without splitting any."""

    validation_samples: Count = 64
    """Number of sequences of each held-out text to evaluate, counted from its beginning."""

    text_key: str = "text"
    """Key of JSON lines, or column of tables, that holds the text. Requires kind text."""

    add_bos: bool = False
    """Begin each document with the tokenizer's begin-of-text token, as Llama was trained. Documents
    always end with the end-of-text token. Requires kind text; a chat template adds its own."""

    max_malformed: NonNegativeInt = 0
    """Number of malformed lines or conversations per text to skip, count and show before the run
    fails."""

    warn_above_epochs: Positive = 4.0
    """Warn before the run about domains that will be repeated more often than this. Up to about
    four epochs are nearly as good as new text (arXiv 2305.16264)."""


class Stage(Section):
    """Consecutive steps in which the same parameters are trained."""

    steps: Count | None = None
    """Number of optimizer steps. The last stage has none: it takes the rest of the run."""

    freeze: list[Role] = []
    """Roles that this stage does not train, as in train.freeze."""


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

    gradient_accumulation_fusion: bool = True
    """Add weight gradients to their fp32 buffers inside the matrix products."""

    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32. false: in bf16, which halves the bytes of gradients
    and of their reduction, and rounds each sum over micro-batches and ranks to 8 bits. Only with
    precision bf16."""

    freeze: list[Role] = []
    """Roles whose parameters are not trained: they have no gradients, no optimizer state and no
    reduction over dp. dense_ffn is the FFN of layers that stay dense, norms are all norms,
    embeddings include the output layer. A frozen router keeps its expert biases too."""

    stages: list[Stage] = []
    """Stages that train different roles, in order, instead of freeze. Between two stages the run
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

    def frozen_after(self, step: int) -> frozenset[Role]:
        """Return the roles that are frozen in the step after ``step``."""
        if not self.stages:
            return frozenset(self.freeze)
        current = sum(start <= step for start in self.stage_starts())
        return frozenset(self.stages[current - 1].freeze)

    @property
    def always_frozen(self) -> frozenset[Role]:
        """Roles that are never trained."""
        return frozenset.intersection(*map(self.frozen_after, self.stage_starts()))


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

    lr_multipliers: dict[Role, Positive] = {}
    """Factors on the learning rate (lr and min_lr) of roles, such as router: 10. Other roles have
    1. To train a role not at all, see train.freeze."""

    weight_decay_multipliers: dict[Role, NonNegative] = {}
    """Factors on the weight decay of the matrices of roles. Norms and biases have no weight decay
    with any factor."""

    clip_grad: Positive = 1.0
    """Global gradient norm above which gradients are scaled down."""

    use_distributed_optimizer: bool = True
    """Shard optimizer state over dp (ZeRO-1; whole matrices with muon). false: every replica keeps
    all of it."""

    def decay_length(self, steps: int) -> int:
        """Return the step at which the schedules end, in a run of ``steps`` steps."""
        return self.lr_decay_steps or steps

    def warmup_length(self, steps: int) -> int:
        """Return the number of warm-up steps, in a run of ``steps`` steps."""
        if self.lr_warmup_fraction is None:
            return self.warmup_steps
        return round(self.lr_warmup_fraction * self.decay_length(steps))


class Checkpoint(Section):
    """Interval between checkpoints, and their number."""

    interval: Count = 1000
    """Number of steps between checkpoints. The last step is always saved."""

    keep: Count = 3
    """Number of newest checkpoints to keep on disk."""

    async_save: bool = False
    """Write checkpoints in the background while training continues. Needs host memory for a copy of
    the state."""


class Guard(Section):
    """Which failures a run survives, and when it gives up."""

    max_skipped_steps: NonNegativeInt = 10
    """Number of consecutive steps without a finite loss and gradient norm that may be skipped
    before the run stops. A skipped step changes no weights but counts for the schedule and the
    data."""

    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """If the loss exceeds this multiple of the mean of the previous 16 steps, restore the newest
    checkpoint and skip the batches seen since. None: accept any finite loss."""

    hang_seconds: Positive = 1800
    """End the job if no rank makes progress for this many seconds, and name the stuck rank. Set it
    above the duration of the longest load, validation or save."""

    save_retry_seconds: NonNegative = 600
    """Keep retrying the last save of a job for this many seconds if the disk refuses it. Earlier
    saves are retried after checkpoint.interval steps."""


class Log(Section):
    """Destinations of metrics besides metrics.jsonl, and warnings about routers."""

    tensorboard: bool = True
    """Write TensorBoard files to run.dir/tensorboard."""

    wandb_project: str | None = None
    """Name of a Weights & Biases project. Requires the extra wandb. All jobs of a run write to one
    run there; with WANDB_MODE=offline, to files for `wandb sync`."""

    router_warning_steps: Count = 100
    """Warn about a router after this many consecutive steps in which an expert got no token, K
    experts got 99% of the choices (collapse), or the load exceeded router_max_load."""

    router_max_load: Annotated[float, Field(gt=1)] | None = None
    """Bound for the warning on the load of a layer's busiest expert, in multiples of the mean.
    None: no bound."""


class RunConfig(Section):
    """The whole configuration of a run, one section per stage."""

    run: Run
    source: Source
    moe: Moe
    upcycle: Upcycle = Upcycle()
    measure: Measure = Measure()
    parallel: Parallel = Parallel()
    data: Data
    train: Train
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    log: Log = Log()
