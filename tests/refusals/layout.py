"""Refused layouts: degrees that do not divide the model, the batch or the ranks."""

from legal_runs import parallel

from refusals.overlap import EXCHANGE

# Rule, changes to a legal configuration, world size, complete message.
REFUSALS = [
    ("dp", parallel(tp=2, cp=2), 6,
     "world_size (6) must be divisible by pp * cp * tp = 1 * 2 * 2 = 4: dp is the quotient.\n"
     "  nearest world_size: 4, 8"),
    ("edp", parallel(ep=4) | {"train.global_batch_size": 6}, 6,
     "world_size (6) must be divisible by pp * ep * etp = 1 * 4 * 1 = 4: edp is the quotient.\n"
     "  nearest world_size: 4, 8"),
    ("edp-too-few", parallel(ep=8), 4,
     "world_size (4) must be divisible by pp * ep * etp = 1 * 8 * 1 = 8: edp is the quotient.\n"
     "  nearest world_size: 8"),
    ("heads", parallel(tp=4), 4,
     "parallel.tensor_parallel_size (4) must divide num_attention_heads of the dense model (12), "
     "and divide num_key_value_heads (6) or be a multiple of it, and divide the rows of the fused "
     "projection (96): a tp rank holds whole query groups, or equally many ranks share each "
     "group.\n"
     "  valid tensor_parallel_size: 1, 2, 3, 6, 12"),
    ("experts", parallel(ep=3), 3,
     "moe.num_moe_experts (8) must be divisible by parallel.expert_parallel_size (3): each ep rank "
     "holds whole experts.\n  valid expert_parallel_size: 1, 2, 4, 8"),
    ("expert-neurons", parallel(etp=5) | {"train.global_batch_size": 5}, 5,
     "moe.moe_ffn_hidden_size (48) must be divisible by parallel.expert_tensor_parallel_size "
     "(5): every etp rank must hold an equal share of an expert's neurons.\n"
     "  valid expert_tensor_parallel_size: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
    ("topk", {"moe.moe_router_topk": 9}, 1,
     "moe.moe_router_topk (9) must be at most moe.num_moe_experts (8): a token is routed to "
     "distinct experts.\n"
     "  largest moe.moe_router_topk: 8"),
    ("tp-overlap", {"train.tp_comm_overlap": True}, 1,
     "train.tp_comm_overlap (true) needs parallel.tensor_parallel_size (1) to be at least 2: there "
     "is no communication to overlap.\n  leave train.tp_comm_overlap unset"),
    ("tp-overlap-engine", parallel(tp=3) | {"train.tp_comm_overlap": True, "run.engine": "torch",
     "train.global_batch_size": 3}, 3,
     "train.tp_comm_overlap (true) needs run.engine to be transformer_engine: only its linear "
     "layers overlap communication with matrix products.\n"
     "  leave train.tp_comm_overlap unset"),
    ("top1", {"moe.moe_router_topk": 1}, 1,
     "moe.moe_router_topk (1) with moe.router_order (topk_softmax) is not trainable: the softmax "
     "over one chosen expert is always 1, so the router gets no gradient.\n"
     "  set moe.router_order=softmax_topk or moe.moe_router_topk=2"),
    ("vpp-alone", parallel(vpp=2), 1,
     "parallel.virtual_pipeline_parallel_size (2) needs parallel.pipeline_parallel_size of at "
     "least 2: chunks are interleaved between stages.\n"
     "  leave parallel.virtual_pipeline_parallel_size unset"),
    ("layers", parallel(pp=2, vpp=4), 2,
     "num_hidden_layers of the dense model (12) must be divisible by pp * vpp = 2 * 4 = 8: every "
     "chunk must hold the same number of layers.\n"
     "  nearest pp x vpp: 2x3, 3x2, 6x1, 2x2\n"
     "  or set parallel.num_layers_in_first_pipeline_stage=4 "
     "parallel.num_layers_in_last_pipeline_stage=8"),
    ("uneven", parallel(pp=4) | {"parallel.num_layers_in_first_pipeline_stage": 2}, 4,
     "parallel.num_layers_in_first_pipeline_stage (2) and "
     "num_layers_in_last_pipeline_stage (unset) must leave equal numbers of the 12 layers to all "
     "other stages (pp = 4), and vpp = 1 must divide the layers of every stage.\n"
     "  parallel.num_layers_in_first_pipeline_stage=3 "
     "parallel.num_layers_in_last_pipeline_stage=3"),
    ("exchange-alone", {"train.overlap_moe_expert_parallel_comm": True}, 1,
     "train.overlap_moe_expert_parallel_comm (true) needs parallel.expert_parallel_size (1) to be "
     "at least 2: no tokens are exchanged between ranks.\n"
     "  leave train.overlap_moe_expert_parallel_comm unset"),
    ("exchange-stages", EXCHANGE | parallel(pp=2, ep=2), 4,
     "train.overlap_moe_expert_parallel_comm (true) with parallel.pipeline_parallel_size (2) needs "
     "parallel.virtual_pipeline_parallel_size (1) to be at least 2: only the interleaved schedule "
     "pairs the forward pass of one micro-batch with the backward pass of another.\n"
     "  set parallel.virtual_pipeline_parallel_size=2, or leave "
     "train.overlap_moe_expert_parallel_comm unset"),
    ("exchange-one-batch", EXCHANGE | {"train.global_batch_size": 2}, 2,
     "train.overlap_moe_expert_parallel_comm (true) needs at least two micro-batches in a step, "
     "but train.global_batch_size (2) / (micro_batch_size * dp) is 1: there is no other one to "
     "compute meanwhile.\n  smallest train.global_batch_size: 4"),
    ("layout-chunks", parallel(pp=2) | {"parallel.pipeline_model_parallel_layout": "Et*6|t*3|t*3L"},
     2, "parallel.pipeline_model_parallel_layout (Et*6|t*3|t*3L) has 3 chunks, which must be "
     "pp * vpp = 2 * 1 = 2, with pp of at least 2: each rank of the pipeline holds vpp of them.\n"
     "  for example parallel.pipeline_parallel_size=2 "
     "parallel.pipeline_model_parallel_layout='Et*6|t*6L'"),
    ("layout-layers", parallel(pp=2) | {"parallel.pipeline_model_parallel_layout": "Et*6|t*5L"}, 2,
     "parallel.pipeline_model_parallel_layout (Et*6|t*5L) must have E first, then a t for each of "
     "the 12 layers, and L last: it is Etttttt|tttttL, with 11 layers.\n"
     "  for example parallel.pipeline_parallel_size=2 "
     "parallel.pipeline_model_parallel_layout='Et*6|t*6L'"),
    ("layout-letters", parallel(pp=2) | {"parallel.pipeline_model_parallel_layout": "Et*12m|L"}, 2,
     "parallel.pipeline_model_parallel_layout (Et*12m|L) must have E first, then a t for each of "
     "the 12 layers, and L last: it is Ettttttttttttm|L, with 12 layers.\n"
     "  for example parallel.pipeline_parallel_size=2 "
     "parallel.pipeline_model_parallel_layout='Et*6|t*6L'"),
    ("layout-empty", parallel(pp=3) | {"parallel.pipeline_model_parallel_layout": "Et*12||L"}, 3,
     "parallel.pipeline_model_parallel_layout (Et*12||L) has a chunk without anything: its rank "
     "would have no parameters.\n"
     "  for example parallel.pipeline_parallel_size=3 "
     "parallel.pipeline_model_parallel_layout='Et*4|t*4|t*4L'"),
    ("layout-endless", parallel(pp=2)
     | {"parallel.pipeline_model_parallel_layout": "Et*9999999999|L"}, 2,
     "parallel.pipeline_model_parallel_layout (Et*9999999999|L) is no layout: a layout may repeat "
     "a part 1000 times, not 9999999999 times"),
    ("layout-twice", parallel(pp=2) | {"parallel.pipeline_model_parallel_layout": "Et*8|t*4L",
                                       "parallel.num_layers_in_last_pipeline_stage": 4}, 2,
     "parallel.pipeline_model_parallel_layout (Et*8|t*4L) and "
     "parallel.num_layers_in_last_pipeline_stage (4) both say how many layers a stage has.\n"
     "  remove one of them"),
    ("sequence", parallel(tp=2) | {"data.seq_length": 47}, 2,
     "data.seq_length (47) must be divisible by tp = 2: the sequence is sharded over these "
     "ranks.\n"
     "  nearest data.seq_length: 46, 48"),
    ("sequence-zigzag", parallel(tp=2, cp=2) | {"data.seq_length": 50}, 4,
     "data.seq_length (50) must be divisible by 2 * cp * tp = 8: the sequence is sharded over "
     "these ranks.\n"
     "  nearest data.seq_length: 48, 56"),
    ("too-long", {"data.seq_length": 257}, 1,
     "data.seq_length (257) must be at most the dense model's max_position_embeddings (256): it "
     "was not trained on later positions.\n"
     "  largest data.seq_length: 256"),
    ("batch", {"train.global_batch_size": 10, "train.micro_batch_size": 2}, 4,
     "train.global_batch_size (10) must be divisible by train.micro_batch_size * dp = 2 * 4 = 8: "
     "every replica processes whole micro-batches.\n"
     "  nearest train.global_batch_size: 8, 16"),
    ("batch-vpp", parallel(pp=2, vpp=2) | {"train.global_batch_size": 3}, 2,
     "micro-batches of a step (train.global_batch_size / (micro_batch_size * dp) = 3) must be "
     "divisible by parallel.pipeline_parallel_size (2) with virtual_pipeline_parallel_size: the "
     "interleaved schedule runs them in rounds.\n  nearest train.global_batch_size: 2, 4"),
    ("ramp-parts", {"train.rampup_batch_size": {"start": 8, "increment": 12, "samples": 99}}, 1,
     "train.global_batch_size (48) minus train.rampup_batch_size.start (8) must be a multiple of "
     "train.rampup_batch_size.increment (12): the batch grows by increments.\n"
     "  set train.rampup_batch_size.increment to a divisor of the difference"),
    ("ramp-replicas", {"train.rampup_batch_size": {"start": 8, "increment": 5, "samples": 99}}, 4,
     "train.rampup_batch_size.increment (5) must be divisible by train.micro_batch_size * dp (* pp "
     "if chunks are interleaved) = 4: every batch of the ramp consists of whole micro-batches of "
     "each replica.\n  nearest train.rampup_batch_size.increment: 4, 8"),
]  # fmt: skip
