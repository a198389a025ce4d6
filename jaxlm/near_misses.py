"""What people type who come from other tools, and the right thing here: keys, values of keys, options and verbs.

Names are looked up in lower case and with underscores; spelling mistakes are `jaxlm.errors.nearest`'s business.
"""

from collections.abc import Collection


def _each(names: str, right: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), right)


# Other tools' names of a key, as nanoGPT, transformers, MaxText, Megatron, torchtitan, Levanter and their users write
# them.
_KEYS = {
    "run_dir": "output_dir out_dir output save_dir log_dir logdir logging_dir checkpoint_dir work_dir workdir experiment_dir "
               "base_output_directory run_name exp_name",
    "init": "init_from init_checkpoint load load_from load_checkpoint load_parameters_path load_full_state_path from_pretrained "
            "pretrained pretrained_model model_name_or_path model_path ckpt ckpt_path checkpoint_path restore_from "
            "initialize_from weights base_model",
    "seed": "random_seed manual_seed rng_seed data_seed init_seed",
    "stages": "phases phase curriculum training_stages curriculum_learning stage",
    "model.family": "model_type model_name architecture arch",
    "model.num_layers": "n_layer n_layers num_hidden_layers num_layer layers depth num_blocks base_num_decoder_layers",
    "model.num_heads": "n_head n_heads num_attention_heads attention_heads heads num_query_heads base_num_query_heads",
    "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads num_query_groups kv_heads base_num_kv_heads",
    "model.head_dim": "d_head d_kv head_size kv_channels",
    "model.hidden_size": "n_embd n_embed d_model hidden_dim embed_dim embedding_dim embedding_size emb_dim width dim "
                         "model_dim base_emb_dim hidden",
    "model.intermediate_size": "d_ff ffn_dim ffn_hidden_size intermediate_dim mlp_dim mlp_hidden_size n_inner base_mlp_dim",
    "model.vocab_size": "n_vocab vocab vocabulary_size num_tokens_vocab",
    "model.max_length": "n_positions max_position_embeddings max_positions max_seq_len_model",
    "model.dropout": "hidden_dropout hidden_dropout_prob resid_pdrop resid_dropout embd_pdrop dropout_rate dropout_prob",
    "model.attention_dropout": "attn_pdrop attn_dropout attention_dropout_prob attention_probs_dropout_prob",
    "model.norm_epsilon": "layer_norm_eps layer_norm_epsilon layernorm_epsilon rms_norm_eps norm_eps",
    "model.activation": "activation_function hidden_act act_fn",
    "model.attention": "attn_implementation flash_attention flash_attn use_flash_attention attention_impl attn_impl",
    "model.tied_embeddings": "tie_word_embeddings tie_embeddings tie_weights weight_tying",
    "model.rope_theta": "rope_base rope_max_timescale rotary_base",
    "model.num_experts": "n_experts num_local_experts experts n_routed_experts",
    "model.experts_per_token": "num_experts_per_tok num_experts_per_token moe_top_k",
    "model.initializer_range": "init_std init_range initializer_std",
    "data.global_batch_size": "batch_size batch bs train_batch_size total_batch_size per_device_batch_size "
                              "per_device_train_batch_size global_batch micro_batch_size",
    "data.sequence_length": "block_size seq_len seq_length sequence_len context_length context_len context_size ctx_len n_ctx "
                            "max_seq_len max_seq_length max_target_length max_sequence_length chunk_size",
    "data.raw": "train_file train_files train_data dataset datasets dataset_name dataset_path data_path data_dir input "
                "input_file text text_file texts file files",
    "data.validation": "validation_file val_file eval_file val_split test_size validation_split_percentage val_fraction "
                       "validation_fraction val_size",
    "data.text_field": "text_column text_column_name text_key content_field column",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_type tokenizer_name_or_path tokenizer_model",
    "data.masking.probability": "mlm_probability mlm_prob mask_prob masking_probability mask_ratio mlm_mask_prob",
    "data.prepare_processes": "num_workers num_proc workers preprocessing_num_workers dataloader_num_workers",
    "task.name": "task task_name task_type finetuning_task",
    "task.problem": "problem_type",
    "task.labels": "label_names class_names label_list num_labels num_classes id2label label2id",
    "task.best": "metric_for_best_model best_metric monitor main_metric",
    "out": "output_file predictions_file out_file output_path",
    "train.steps": "max_steps max_iters max_iterations num_iterations iterations iters num_steps total_steps train_steps "
                   "training_steps num_train_steps n_steps steps",
    "train.epochs": "epochs epoch num_epochs max_epochs n_epochs num_train_epochs train_epochs total_epochs num_epoch",
    "train.tokens": "max_tokens num_tokens train_tokens total_tokens tokens target_tokens token_budget training_tokens",
    "train.hours": "hours max_time max_hours time_budget max_train_time wall_time time_limit max_duration",
    "train.precision": "bf16 fp16 fp32 tf32 bfloat16 float16 float32 half amp mixed_precision dtype torch_dtype compute_dtype "
                       "precision use_bf16",
    "train.gradient_accumulation": "gradient_accumulation_steps grad_accum grad_accum_steps accumulation_steps grad_accumulation "
                                   "accumulate_grad_batches num_microbatches microbatches",
    "train.remat": "gradient_checkpointing activation_checkpointing grad_checkpointing remat_policy recompute checkpointing",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr max_learning_rate peak_learning_rate eta",
    "optimizer.name": "optim optimizer_name optimizer_type opt",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.b1": "beta1 adam_beta1 beta_1 adam_b1 momentum",
    "optimizer.b2": "beta2 adam_beta2 beta_2 adam_b2",
    "optimizer.epsilon": "eps adam_epsilon adam_eps",
    "optimizer.clip_norm": "grad_clip max_grad_norm gradient_clip gradient_clip_val gradient_clipping clip_grad clip_grad_norm "
                           "gradient_clipping_threshold grad_norm_clip clip",
    "schedule.name": "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_schedule_type lr_decay_style",
    "schedule.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps lr_warmup_iters warmup_ratio "
                             "warmup_steps_fraction warmup_fraction",
    "schedule.decay_steps": "lr_decay_iters decay_iters lr_decay_steps",
    "schedule.final_ratio": "min_lr min_learning_rate final_lr end_lr min_lr_ratio lr_min cosine_learning_rate_final_fraction",
    "mesh.data": "dp data_parallel data_parallel_size ddp num_replicas ici_data_parallelism data_parallel_replicate_degree",
    "mesh.fsdp": "zero zero_stage ici_fsdp_parallelism fsdp_size data_parallel_shard_degree",
    "mesh.tensor": "tp tensor_parallel tensor_parallel_size model_parallel_size ici_tensor_parallelism tensor_parallel_degree",
    "mesh.context": "cp sp context_parallel context_parallel_size sequence_parallel context_parallel_degree",
    "mesh.stage": "pp pipeline_parallel pipeline_parallel_size pipeline_parallel_degree",
    "mesh.expert": "ep expert_parallel expert_parallel_size expert_parallel_degree",
    "devices.platform": "device accelerator backend platform hardware use_cpu no_cuda",
    "devices.count": "num_devices n_devices num_gpus n_gpus ngpus gpus n_gpu num_tpus",
    "checkpoint.every_steps": "save_steps save_interval save_every checkpoint_every checkpoint_interval checkpoint_period "
                              "ckpt_every",
    "checkpoint.keep_last": "save_total_limit keep_checkpoints max_checkpoints max_to_keep keep_last_n",
    "eval.every_steps": "eval_steps eval_interval eval_every eval_freq evaluation_strategy eval_strategy val_interval "
                        "val_check_interval",
    "eval.steps": "eval_iters eval_batches max_eval_steps limit_val_batches",
    "eval.batch_size": "eval_batch_size per_device_eval_batch_size val_batch_size",
    "logging.every_steps": "logging_steps log_interval log_every log_freq log_every_n_steps log_period log_steps",
    "logging.tensorboard": "report_to wandb use_wandb wandb_log wandb_project enable_tensorboard",
    "generate.prompts": "prompt start input_text generate_prompt",
    "generate.max_new_tokens": "new_tokens max_length_generated max_generated_tokens",
    "generate.num_samples": "num_return_sequences n_samples",
}
KEYS = {name: key for key, names in _KEYS.items() for name in names.split()}

_AS_LONG = "model.max_length must be at least as long."
_IN_SEQUENCES = "It is in sequences, over all devices and micro-batches."
NOTES = {
    "max_tokens": "For the length of a continuation: generate.max_new_tokens.",
    **_each("max_time max_train_time wall_time time_limit time_budget max_duration", "It is in hours."),
    **_each("batch_size per_device_batch_size per_device_train_batch_size", _IN_SEQUENCES),
    "micro_batch_size": f"{_IN_SEQUENCES} train.gradient_accumulation says into how many micro-batches it is cut.",
    **_each("bf16 bfloat16 use_bf16 amp mixed_precision half", "Write train.precision=bfloat16."),
    **_each("fp16 float16", "There is no float16; bfloat16 needs no loss scaling: train.precision=bfloat16."),
    **_each("fp32 float32 tf32", "Write train.precision=float32, which is the default."),
    **_each("block_size seq_len seq_length context_length max_seq_len max_seq_length n_ctx",
            _AS_LONG),
    **_each("warmup_ratio warmup_steps_fraction warmup_fraction", "It is in steps, no share."),
    **_each("min_lr min_learning_rate final_lr end_lr lr_min", "It is a share of optimizer.learning_rate."),
    **_each("wandb use_wandb wandb_log wandb_project report_to",
            "Figures go to metrics.jsonl and TensorBoard events, to nothing else."),
    **_each("num_labels num_classes", "The labels are found in the training file; the key names them, in their order."),
    **_each("gradient_checkpointing activation_checkpointing", "Write train.remat=full, or dots."),
}

SAME_VALUE = (_AS_LONG, _IN_SEQUENCES)  # notes of names whose value can be taken over

# What other tools have and jaxlm has not: no key is near.
_GOES_ON = "a run goes on from the checkpoints in its own run_dir by itself; init=FOLDER begins with other weights"
_ONE_TASK = "jaxlm trains whole models; adapters and frozen layers are not there yet"
MISSING = {
    **_each("resume resume_from resume_from_checkpoint resume_from_path", _GOES_ON),
    **_each("lora lora_r lora_alpha lora_rank peft freeze layer_decay", _ONE_TASK),
    **_each("compile torch_compile", "every step is compiled; there is nothing to switch on"),
    **_each("config config_file config_path c", "the run file stands by itself: jaxlm VERB CONFIG.yaml [KEY=VALUE ...]"),
    **_each("nproc_per_node num_processes nproc nprocs", "to start N processes on this machine: --processes N"),
}

# key -> right value -> what else it is called
_VALUES = {
    "train.precision": {"bfloat16": "bf16 fp16 float16 half mixed mixed_bfloat16 bf16_mixed amp 16",
                        "float32": "fp32 tf32 full single 32"},
    "train.gradient_precision": {"bfloat16": "bf16 fp16 float16", "float32": "fp32"},
    "train.remat": {"full": "true yes on all", "none": "false no off", "dots": "minimal selective"},
    "model.family": {"gpt": "gpt2 gpt_2 gpt3 gpt_3 gpt_neo decoder causal_lm", "llama": "llama2 llama3 llama_2 llama_3",
                     "qwen2": "qwen qwen2_5", "bert": "encoder masked_lm mlm", "roberta": "xlm_roberta",
                     "distilbert": "distil_bert", "lstm": "rnn bilstm recurrent"},
    "task.name": {"causal_lm": "clm lm language_modeling next_token", "masked_lm": "mlm fill_mask", "bert": "nsp pretraining",
                  "text_classification": "classification sequence_classification sentiment_analysis sentiment regression glue"},
    "task.problem": {"single_label": "single_label_classification classification multiclass binary",
                     "multi_label": "multi_label_classification multilabel", "regression": "score"},
    "model.positions": {"rope": "rotary", "learned": "absolute embedding"},
    "model.normalization": {"rmsnorm": "rms rms_norm", "layernorm": "layer_norm ln"},
    "model.activation": {"swiglu": "silu swish glu", "gelu_tanh": "gelu_new gelu_fast gelu_pytorch_tanh"},
    "model.attention": {"auto": "flash flash_attention flash_attention_2 sdpa fused default true",
                        "xla": "eager dot_product naive"},
    "optimizer.name": {"adamw": "adam_w adamw_torch adamw_torch_fused", "sgd": "momentum"},
    "schedule.name": {"warmup_stable_decay": "wsd", "cosine": "cosine_with_warmup cosine_decay", "linear": "linear_warmup",
                      "constant": "constant_with_warmup none", "inverse_square_root": "inverse_sqrt inv_sqrt rsqrt noam"},
    "devices.platform": {"gpu": "cuda nvidia rocm amd"},
    "data.packing": {"concatenate": "concat true", "documents": "document packed"},
    "data.document": {"line": "lines", "file": "files"},
}
VALUES = {key: {name: right for right, names in values.items() for name in names.split()} for key, values in _VALUES.items()}

_VERBS = {
    "train": "pretrain pretraining pre_train fit run resume continue start finetune fine_tune finetuning fine_tuning sft tune",
    "prepare": "preprocess tokenize tokenise prep data build prepare_data",
    "evaluate": "eval test validate val score perplexity",
    "predict": "infer inference classify classification predict_proba predictions label",
    "generate": "sample complete gen prompt chat",
    "import": "import_hf from_hf from_pretrained hf_import import_model load download pull convert_from_hf",
    "export": "export_hf to_hf save_pretrained hf_export export_model push push_to_hub save publish upload convert_to_hf",
    "bench": "benchmark profile speed",
    "plan": "estimate memory simulate dry_run search",
    "report": "compare summary summarize plot tensorboard show",
}
VERBS = {name: verb for verb, names in _VERBS.items() for name in names.split()}
TWO_VERBS = _each("convert convert_checkpoint convert_weights huggingface hf transformers",
                  "; 'import' reads a Hugging Face folder, 'export' writes one")

_NOT_YET = {
    "trains adapters": "lora peft", "learns preferences": "dpo rlhf", "makes vectors of texts": "embed encode",
    "serves a model": "serve server deploy api",
    "makes a model smaller": "compress quantize prune distill", "tries many runs": "sweep",
}
NOT_YET = {name: what for what, names in _NOT_YET.items() for name in names.split()}


def normal(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def right_key(name: str, known: Collection[str]) -> tuple[str | None, str]:
    """The key that another tool's `name` stands for, whatever its section, or None, and what to say beside it."""
    full = normal(name)
    first, last = full.partition(".")[0], full.rpartition(".")[2]
    if full in known:
        return full, ""
    missing = MISSING.get(last) or (MISSING.get(first) if first not in {key.partition(".")[0] for key in known} else None)
    if missing:
        return None, missing
    return (KEYS[last], NOTES.get(last, "")) if last in KEYS else (None, "")


def right_value(key: str, value: str) -> str | None:
    """What a value that other tools have is called here; None: it is not known."""
    return VALUES.get(key, {}).get(normal(value))
