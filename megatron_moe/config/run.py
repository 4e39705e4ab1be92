"""Everything a run can be told. Read this file first; each stage takes only its own section.

A setting that goes to Megatron-Core untouched keeps Megatron's name, so a search finds it in both
code bases. A setting we compute with before Megatron sees it has a name of ours. What cannot be
judged from one section alone (does tp divide the heads? does the world hold the layout?) is judged
by ``parallel/legality.py``, which sees the dense model and the world size too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]

Method = Literal[
    "copy",
    "drop",
    "granular",
    "split_random",
    "split_clustered",
    "sharing_inner",
    "sharing_inter",
    "qwen",
    "weaver",
    "mix",
]
RouterInit = Literal["normal", "uniform", "zero", "gate_mean", "virtual_groups", "centroids"]


class Section(BaseModel):
    """One section: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True
    )


class Run(Section):
    """Where the run lives and what it runs on."""

    dir: Path
    """Folder of the run: config.yaml, receipt.json, metrics.jsonl, checkpoints/."""

    seed: int = 0
    """Seed of the data order. Weights are not random: see upcycle.seed for what is."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when a device is there, and says which it took."""

    engine: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Implementation of the layers. auto: Transformer Engine on CUDA if a supported version is
    installed, otherwise torch. Both read and write the same checkpoints."""


class Dense(Section):
    """The dense model the run starts from."""

    path: Path
    """Hugging Face folder: config.json, safetensors, tokenizer files. In place of the safetensors
    may lie the files of a dense torch_dist checkpoint of Megatron-Core."""


class Moe(Section):
    """Shape and router of the Mixture-of-Experts layers."""

    num_moe_experts: Count
    """Experts of each MoE layer (E)."""

    moe_router_topk: Count = 2
    """Experts each token goes to (K)."""

    moe_ffn_hidden_size: Count | None = None
    """Neurons of one expert (M). None: as many as the dense layer's FFN has."""

    router_order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """topk_softmax (Mixtral): softmax over the chosen K, so K equal copies reproduce the dense
    layer. softmax_topk: probabilities of all E, not renormalised."""

    moe_layers: Literal["all"] | list[NonNegativeInt] = "all"
    """Ids of the layers that become MoE, counted from 0; the others stay dense."""

    first_dense_layers: NonNegativeInt = 0
    """With moe_layers "all": layers at the beginning that stay dense nevertheless."""

    last_dense_layers: NonNegativeInt = 0
    """The same at the end."""

    moe_shared_expert_intermediate_size: Count | None = None
    """Neurons of an expert that every token passes, next to the routed ones (S); None: none."""

    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """sigmoid (DeepSeek-V3): each expert scored alone, and the scores of the chosen K divided by
    their sum."""

    router_gate: Literal["linear", "noisy_linear", "noisy_mlp"] = "linear"
    """noisy_linear, noisy_mlp (LLaMA-MoE): learnt noise on the logits while training, from a gate
    of one linear layer or of linear, tanh, linear."""

    moe_router_load_balancing_type: Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "cv_squared", "none"
    ] = "aux_loss"
    """Over which tokens the balancing loss is taken: of a micro-batch (arXiv 2101.03961), of one
    sequence, or of the global batch's micro-batches so far (arXiv 2501.11873). cv_squared: the
    noisy gate's own loss, CV^2 of importance and of load, of a micro-batch."""

    moe_aux_loss_coeff: NonNegative = 1e-2
    """Weight of the load-balancing loss of each layer."""

    moe_z_loss_coeff: NonNegative = 0.0
    """Weight of the router's z-loss (arXiv 2202.08906), which keeps its logits small."""

    moe_router_enable_expert_bias: bool = False
    """Balance without a loss (arXiv 2408.15664): a bias per expert, for choosing only, that moves
    against its load after each step. Needs moe_router_score_function sigmoid."""

    moe_router_bias_update_rate: Positive = 1e-3
    """How far an expert's bias moves in a step."""

    moe_expert_capacity_factor: Positive | None = None
    """Sets how many tokens an expert may take (capacity_formula); None drops nothing."""

    capacity_formula: Literal["megatron", "tokens_per_expert"] = "megatron"
    """megatron: ceil(tokens * K / E * factor). tokens_per_expert: ceil(tokens / E * factor), the
    formula of arXiv 2412.09952, so its CF 4 at K 2 is Megatron's 2."""

    capacity_scope: Literal["rank", "sequence"] = "rank"
    """Among which tokens dropping is decided: those of one rank, which depends on tp and cp and
    costs nothing, or whole sequences of the micro-batch, which does not and costs a gather."""

    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which choices go first: the least probable, or the last of the sequence."""

    moe_pad_expert_input_to_capacity: bool = False
    """Give every expert exactly its capacity, with zeros where it has fewer tokens."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens travel to experts. flex: DeepEP's or HybridEP's kernels, on CUDA."""

    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = "deepep"
    """Whose kernels flex uses; they must be installed."""

    @property
    def megatron_capacity_factor(self) -> float | None:
        """The factor that means the same in Megatron-Core's formula, ceil(tokens * K / E * it)."""
        factor = self.moe_expert_capacity_factor
        if factor is None or self.capacity_formula == "megatron":
            return factor
        return factor / self.moe_router_topk


class Upcycle(Section):
    """How experts are built from the dense FFN of F neurons."""

    method: Method = "copy"
    """Which dense neurons an expert of M neurons is made of.

    copy             all (arXiv 2412.09952, 2212.05055)
    drop             all, part of them drawn anew (Drop-Upcycling, 2502.19261)
    granular         one of G = F / M shards, in R = E / G replicas (virtual groups, 2410.07524)
    split_random     its part of a random partition (LLaMA-MoE, 2406.16554)
    split_clustered  a cluster of like rows of up, all of one size (same)
    sharing_inner    the M most important for its part of the text (same; needs plan)
    sharing_inter    the same, after those that most experts want went to the shared expert
    qwen             a piece of shuffled copies, half of it drawn anew (Qwen1.5-MoE)
    weaver           a cluster of like activations; even ones are shared (2602.15521; needs plan)
    mix              all, of one of several dense models (Branch-Train-MiX, 2403.07816)
    """

    plan: Path | None = None
    """The plan file that `megatron-moe construct` writes and `train` reads, where the method, the
    router or the scale is measured."""

    mix_with: list[Path] = []
    """With method mix: dense checkpoints besides dense.path. Experts come from dense.path and these
    in turn; all other weights are averaged."""

    seed: int = 0
    """Seed of everything the method draws at random, the router rows included."""

    permutation_seed: int | None = None
    """Order in which copies and shards take the dense neurons; None: as they are."""

    reinit_ratio: Fraction | None = None
    """Part of each expert's neurons that is drawn anew, with mean and std of what it replaces, on
    top of any method. None: 0.5 for drop and qwen, else 0."""

    noise_std: NonNegative = 0.0
    """Standard deviation of noise added to the routed experts' weights, so that copies differ."""

    scale: Literal["exact", "paper", "calibrated", "none"] | None = None
    """With method granular: how the output regains the dense layer's magnitude. exact (None too):
    the factor goes into down. paper: its cube root into gate, up and down. calibrated: the factor
    is measured."""

    rescale: Literal["N/K", "N", "none", "calibrated"] | None = None
    """With other methods: factor of the routed output, N experts of which K are chosen. None: N/K
    where experts are parts of the dense layer (LLaMA-MoE), else none."""

    rescale_at: Literal["weights", "runtime"] = "weights"
    """Multiply down once, or the experts' output always."""

    router_init: RouterInit | None = None
    """Rows of the router. None: virtual_groups for granular, uniform for drop, gate_mean for
    weaver, else normal. normal, uniform: of router_init_std. zero: as good as zero, with ties
    broken. gate_mean: the mean of the expert's rows of gate. virtual_groups: random rows, each
    repeated so that the shards of a replica are chosen together. centroids: of k-means over the
    layer's inputs (needs plan)."""

    router_init_std: NonNegative = 0.02
    """Standard deviation of the router's random rows."""

    verify: Literal["auto", "always", "never"] = "auto"
    """Compare logits with the dense model after upcycling. auto: up to 1e9 dense parameters."""


class Measure(Section):
    """How `megatron-moe construct` measures the dense model."""

    samples: Count = 256
    """Sequences of the training text that are looked at; a multiple of moe.num_moe_experts, for
    they are cut into clusters of one size."""

    hidden_states: Count = 4096
    """Inputs of each layer that are kept, for router centroids and calibrated scales."""

    interval: Count = 16
    """Rounds (of one sequence a replica and stage) after which what was measured is kept."""


class Parallel(Section):
    """Degrees of parallelism. dp and edp are whatever is left of the world, so neither is set."""

    tensor_parallel_size: Count = 1
    """Ranks that share the heads of one attention layer (tp)."""

    context_parallel_size: Count = 1
    """Ranks that share one sequence (cp)."""

    pipeline_parallel_size: Count = 1
    """Stages, each a run of consecutive layers (pp)."""

    virtual_pipeline_parallel_size: Count | None = None
    """Model chunks a pipeline rank holds, interleaved (vpp); None or 1: one."""

    expert_parallel_size: Count = 1
    """Ranks that share the experts of one layer, each holding whole experts (ep)."""

    expert_tensor_parallel_size: Count = 1
    """Ranks that share the neurons of one expert (etp)."""


class Domain(Section):
    """One named part of a mixture."""

    path: Path
    """Its text, in the forms of data.path."""

    weight: NonNegative | None = None
    """Share of the samples, with data.mixing.weights (given); the domains' weights sum to 1."""

    validation_path: Path | None = None
    """Its held-out text; or set data.validation_fraction for all domains."""


class Mixing(Section):
    """In which shares the domains are drawn, and how the shares move."""

    weights: Literal["given", "llama", "sheared"] = "given"
    """given: data.domains.*.weight. llama, sheared: the published shares of SlimPajama's seven
    domains (LLaMA-MoE, arXiv 2406.16554): commoncrawl, c4, github, wikipedia, books, arxiv,
    stackexchange. Where a mixture that moves starts."""

    update: Literal["never", "sheared_llama", "doremi"] = "never"
    """never: the weights stay. sheared_llama: more of the domains whose held-out loss is above
    their reference, less of the others (arXiv 2310.06694, algorithm 1). doremi: the same without
    the clamp, so that a domain below its reference loses by how far it is."""

    interval: Count = 100_000_000
    """Tokens between updates, at least those of one step; LLaMA-MoE takes 5e9."""

    reference_losses: Path | None = None
    """What `megatron-moe reference-loss` wrote, or a JSON object {domain: nats per token}."""

    step_size: Positive = 1.0
    """Factor on the excess loss: a domain one nat above its reference gains by exp(step_size)."""

    floor: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """Share c that is spread evenly at every update, so that no domain dies."""


class Data(Section):
    """Text in, batches out."""

    path: Path | None = None
    """A text or JSONL file, a folder of them, or the prefix of a Megatron .bin/.idx pair."""

    domains: dict[str, Domain] | None = None
    """Several texts in given shares, by name; instead of path."""

    mixing: Mixing = Mixing()
    """How domains are mixed."""

    kind: Literal["text", "chat"] = "text"
    """text: every token is learned. chat: conversations (messages or ShareGPT, one a line) in the
    tokenizer's chat template, packed whole; the loss counts on what assistants say."""

    seq_length: Count = 2048
    """Tokens of one training sequence."""

    reset_attention: bool = False
    """Let no token attend to a document or conversation before its own in the same sequence."""

    validation_path: Path | None = None
    """Held-out text, in the forms of path; its loss is logged first and at checkpoints."""

    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this part of each text instead: its last documents, whole ones."""

    validation_samples: Count = 64
    """Sequences of each held-out text that are looked at, from its beginning."""

    max_malformed: NonNegativeInt = 0
    """Malformed lines or broken conversations of a text that are skipped, counted and shown before
    it is an error."""

    warn_above_epochs: Positive = 4.0
    """Say before the run which domains it will read more often than this; up to about four times
    train almost as well as new text (arXiv 2305.16264)."""


class Train(Section):
    """How long, how much at once, in which precision."""

    steps: NonNegativeInt
    """Optimizer steps. 0: upcycle, verify, save, stop."""

    micro_batch_size: Count = 1
    """Sequences a model replica takes through the model at once."""

    global_batch_size: Count = 1
    """Sequences of one optimizer step over all replicas."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights in the optimizer."""

    recompute: Literal["none", "selective", "moe", "full"] = "none"
    """What the backward pass computes again instead of keeping. selective: norms and activation
    functions of experts (on CPU: the core attention); moe: MoE layers and, on CUDA, norms; full:
    every layer."""

    overlap_grad_reduce: bool = True
    """Reduce gradients over dp while the backward pass runs."""

    overlap_param_gather: bool = True
    """On CUDA, gather updated weights over dp while the next forward pass runs."""

    tp_comm_overlap: bool = False
    """On CUDA, overlap tp's gathers and scatters with the products they feed (user buffers)."""

    gradient_accumulation_fusion: bool = True
    """On CUDA, add weight gradients in place, where Apex's kernel is installed."""


class Optimizer(Section):
    """AdamW and its cosine schedule."""

    lr: Positive = 3e-5
    """Peak learning rate (arXiv 2412.09952: 3e-5)."""

    min_lr: NonNegative = 3e-7
    """Learning rate at the last step."""

    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up."""

    weight_decay: NonNegative = 0.1
    """Decoupled weight decay; norms and biases have none."""

    clip_grad: Positive = 1.0
    """Global gradient norm above which gradients are scaled down."""

    use_distributed_optimizer: bool = True
    """Shard optimizer state over dp (ZeRO-1); false: every replica keeps all of it."""


class Checkpoint(Section):
    """When to save and what to keep."""

    interval: Count = 1000
    """Steps between checkpoints; the last step is always saved."""

    keep: Count = 3
    """Newest checkpoints that stay on disk."""

    async_save: bool = False
    """Write files beside the training that goes on; takes host memory for a copy of the state."""


class Guard(Section):
    """What a run survives, and when it gives up."""

    max_skipped_steps: NonNegativeInt = 10
    """Steps in a row without a finite loss and gradient that change no weights, before the run
    stops. A skipped step counts as a step: schedule and data go on."""

    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A loss this many times the mean of the 16 steps before goes back to the newest checkpoint
    and leaves out the batches since. None: whatever is finite is kept."""

    hang_seconds: Positive = 1800
    """When no rank has got on for so long, the job ends and names the rank that hangs. Longer than
    the longest load, validation or save."""

    save_retry_seconds: NonNegative = 600
    """How long the last save of a job is tried again when the disk refuses it. Earlier ones are
    tried again after checkpoint.interval steps."""


class Log(Section):
    """Where numbers go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write run.dir/tensorboard."""

    wandb_project: str | None = None
    """Weights & Biases project; needs the extra wandb."""


class RunConfig(Section):
    """The whole configuration of a run, one section a stage."""

    run: Run
    dense: Dense
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
