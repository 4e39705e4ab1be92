"""List what other programs call a setting: Hugging Face, DeepSpeed, Megatron-LM, torchtitan."""

from __future__ import annotations

SYNONYMS: dict[str, tuple[str, ...]] = {
    "run.dir": ("output_dir", "out_dir", "run_dir", "save", "save_dir"),
    "run.seed": ("random_seed", "data_seed"),
    "run.device": ("accelerator",),
    "source.path": (
        "model", "model_path", "model_name", "model_name_or_path", "pretrained_model_name_or_path",
        "base_model", "hf_model",
    ),
    "data.path": ("dataset", "dataset_path", "data_path", "train_file", "train_data", "corpus"),
    "data.seq_length": (
        "seq_len", "sequence_length", "max_seq_length", "max_seq_len", "max_length", "block_size",
        "context_length", "cutoff_len", "model_max_length",
    ),
    "data.text_key": ("text_column", "text_field", "dataset_text_field", "json_keys"),
    "data.validation_path": ("validation_file", "eval_file", "eval_data", "valid_path"),
    "moe.num_moe_experts": (
        "num_experts", "num_local_experts", "n_experts", "n_routed_experts", "num_routed_experts",
        "experts",
    ),
    "moe.moe_router_topk": (
        "top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "router_topk",
    ),
    "moe.moe_ffn_hidden_size": ("moe_intermediate_size", "expert_size", "expert_hidden_size"),
    "moe.moe_aux_loss_coeff": (
        "aux_loss_coef", "aux_loss_coeff", "aux_loss_alpha", "router_aux_loss_coef",
        "load_balancing_loss_coef",
    ),
    "moe.moe_z_loss_coeff": ("z_loss_coef", "z_loss_coeff", "router_z_loss_coef"),
    "moe.moe_expert_capacity_factor": ("capacity_factor", "moe_capacity_factor"),
    "moe.moe_shared_expert_intermediate_size": (
        "shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts",
    ),
    "train.steps": (
        "max_steps", "num_steps", "train_steps", "total_steps", "train_iters", "num_train_steps",
        "max_iters", "iterations",
    ),
    "train.micro_batch_size": (
        "per_device_train_batch_size", "train_micro_batch_size_per_gpu", "batch_size_per_gpu",
        "local_batch_size", "device_batch_size",
    ),
    "train.global_batch_size": ("batch_size", "train_batch_size", "total_batch_size"),
    "train.precision": ("dtype", "torch_dtype", "mixed_precision", "bf16", "fp16", "fp32"),
    "train.recompute": (
        "gradient_checkpointing", "activation_checkpointing", "recompute_granularity",
    ),
    "train.freeze": ("frozen", "freeze_modules", "frozen_parameters"),
    "lora.rank": ("lora_r", "lora_rank", "lora_dim"),
    "lora.alpha": ("lora_alpha",),
    "lora.targets": ("target_modules", "lora_target_modules"),
    "optimizer.optimizer": ("optim", "optimizer_type", "optimizer_name"),
    "optimizer.lr": ("learning_rate", "max_lr", "peak_lr", "base_lr"),
    "optimizer.min_lr": ("min_learning_rate", "final_lr", "end_lr", "eta_min"),
    "optimizer.warmup_steps": ("num_warmup_steps", "lr_warmup_steps", "lr_warmup_iters"),
    "optimizer.lr_warmup_fraction": ("warmup_ratio", "warmup_fraction"),
    "optimizer.lr_decay_style": ("lr_scheduler_type", "lr_scheduler", "scheduler", "schedule"),
    "optimizer.adam_beta1": ("beta1", "betas", "adam_betas"),
    "optimizer.adam_beta2": ("beta2",),
    "optimizer.adam_eps": ("eps", "epsilon", "adam_epsilon"),
    "optimizer.clip_grad": ("max_grad_norm", "grad_clip", "gradient_clipping", "grad_norm_clip"),
    "optimizer.weight_decay": ("wd",),
    "checkpoint.interval": ("save_steps", "save_interval", "checkpoint_every", "save_every"),
    "checkpoint.keep": ("save_total_limit", "keep_last", "max_checkpoints"),
    "train.fp8": ("fp8_format", "float8"),
    "log.wandb_project": ("wandb", "report_to", "project"),
    "log.mlflow_experiment": ("mlflow", "mlflow_experiment_name", "experiment_name"),
    "parallel.tensor_parallel_size": (
        "tp", "tp_size", "tensor_model_parallel_size", "tensor_parallel", "tensor_parallel_degree",
    ),
    "parallel.pipeline_parallel_size": (
        "pp", "pp_size", "pipeline_model_parallel_size", "pipeline_parallel",
        "pipeline_parallel_degree",
    ),
    "parallel.context_parallel_size": ("cp", "cp_size", "context_parallel", "sequence_parallel"),
    "parallel.expert_parallel_size": (
        "ep", "ep_size", "expert_model_parallel_size", "expert_parallel", "expert_parallel_degree",
    ),
    "parallel.expert_tensor_parallel_size": ("etp", "etp_size"),
}  # fmt: skip
"""Other names of settings, under the setting's own."""

SETTING_OF = {name: setting for setting, names in SYNONYMS.items() for name in names}
