"""Settings of the source model and of the experts that are built from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.values import (
    Beta,
    Count,
    Fraction,
    HomePath,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
)

Method = Literal[
    "copy",
    "drop",
    "granular",
    "split_random",
    "split_clustered",
    "split_coactivation",
    "split_routed",
    "sharing_inner",
    "sharing_inter",
    "qwen",
    "weaver",
    "mix",
    "keep",
    "grow",
    "prune",
]
RouterGate = Literal["linear", "noisy_linear", "noisy_mlp"]
RouterInit = Literal["normal", "uniform", "zero", "gate_mean", "virtual_groups", "centroids"]


class Source(Section):
    """The model that the run starts from."""

    path: HomePath
    """Hugging Face folder of a dense or MoE model: config.json, safetensors files and tokenizer
    files. A torch_dist checkpoint of Megatron-Core may take the place of the safetensors files."""

    optimizer_state: HomePath | None = None
    """Run, or checkpoint of a run, that the MoE in path was exported from. Its AdamW moments
    become those of the new run; each of m copies of an expert gets 1/m of them. None: moments
    begin at zero."""


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

    moe_shared_expert_overlap: bool = False
    """Compute the shared expert while tokens are exchanged between ranks. On CUDA only. Gradients
    of the router and the shared expert are then added in another order, so that results differ
    within rounding."""

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
    """Weight of each layer's load-balancing loss. With adaptive_aux_loss, its upper bound."""

    adaptive_aux_loss: bool = False
    """Adapt each layer's weight of the load-balancing loss to its imbalance (Skywork-MoE, arXiv
    2406.06563): a moving average of aux_loss_sensitivity times the share of choices that are
    dropped. In a dropless run, it is the share that a capacity of the mean load would drop."""

    aux_loss_sensitivity: Positive = 0.2
    """Weight of a layer that drops all choices, before the upper bound. The default is that of
    arXiv 2406.06563."""

    aux_loss_decay: Beta = 0.99
    """Decay of the moving average per step. The default is that of arXiv 2406.06563."""

    revive_after_steps: Count | None = None
    """Re-create an expert from the busiest one of its layer after this many consecutive steps in
    which it got (almost) no tokens. Its weights are a copy; its router row lies halfway between the
    mean row and the copied expert's, so that it enters few sums at first. None: never."""

    revive_below_load: Fraction = 0.01
    """Load up to which an expert counts as without tokens, in multiples of the mean of its layer,
    for revive_after_steps. 0: no token at all."""

    record_routing: HomePath | None = None
    """Folder for the experts that every token chooses in training, layer by layer: one file per
    step and rank, of tokens * MoE layers * K bytes in all. None: record nothing."""

    replay_routing: HomePath | None = None
    """Folder that another run has written with record_routing, under any layout. Tokens go to the
    recorded experts; the router only weighs them. The runs must have the same text, batches and
    seed."""

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

    @property
    def records_or_replays(self) -> bool:
        """Whether the choices of training are recorded or replayed."""
        return self.record_routing is not None or self.replay_routing is not None

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
    split_random and split_clustered also split each expert of a MoE source into parts.

    copy             all of them (arXiv 2412.09952, 2212.05055)
    drop             all of them, some redrawn at random (Drop-Upcycling, 2502.19261)
    granular         one of G = F / M shards, in R = E / G replicas (virtual groups, 2410.07524)
    split_random     one part of a random partition (LLaMA-MoE, 2406.16554)
    split_clustered  one cluster of similar rows of up, all of equal size (LLaMA-MoE)
    split_coactivation  one cluster of neurons that contribute to the same tokens; a shared expert
                     gets those that most tokens use (needs a plan)
    split_routed     the neurons that contribute most to the tokens which a fitted router sends to
                     it, found in turns with that router, from split_coactivation on (needs a plan)
    sharing_inner    the M most important ones for one part of the text (LLaMA-MoE; needs a plan)
    sharing_inter    as sharing_inner, after the neurons that most experts want have moved to the
                     shared expert (LLaMA-MoE; needs a plan)
    qwen             one piece of shuffled copies, half of it redrawn (Qwen1.5-MoE)
    weaver           one cluster of similar activations; evenly active neurons are shared
                     (2602.15521; needs a plan)
    mix              all of them, from one of several dense models (Branch-Train-MiX, 2403.07816)
    keep             the expert of the MoE source, unchanged
    grow             an expert of the MoE source, several times (Expert Upcycling, 2604.19835)
    prune            an expert of the MoE source, some of which are left out (REAP, 2510.13999), or
                     the mean of similar ones (M-SMoE, 2310.01334)
    """

    twins: Literal["noise", "bias", "exact"] | None = None
    """Difference between the copies of an expert with method grow. noise (also None): noise on the
    weights and router rows of all but the first copy. bias: equal weights; the router adds the same
    random row to the first copies of all experts, and another to the second ones. exact: none, and
    top-k grows with the number of copies, so that the output is that of the source."""

    choose: Literal["even", "load", "utility", "reap", "merge"] | None = None
    """Which experts of a MoE source to copy or keep. even (default for grow): copy all equally
    often, or keep experts at equal distances. load: those that most tokens choose. utility: those
    whose weights matter most to the loss. reap (default for prune): those with the largest mean of
    combine weight times output norm. merge (for prune): none; similar experts are averaged by load.
    All but even need a plan."""

    plan: HomePath | None = None
    """Plan file, written by `megatron-moe construct` and read by `train`. Required if the method,
    the router or the scale is measured on text, or if upcycle.fit is not empty."""

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
    """Number of training sequences to measure on. With methods that divide them into one cluster of
    equal size per expert (sharing_inner, sharing_inter, weaver), a multiple of
    moe.num_moe_experts. With upcycle.fit, at least 8, and no more than the text has."""

    hidden_states: Count = 4096
    """Number of inputs per layer that are kept for router centroids and calibrated scales."""

    interval: Count = 16
    """Save measurements after this many rounds (a round is one sequence per replica and stage), so
    that an interrupted run can resume."""
