"""Recipes in the shape of other projects' (own text): ten flat ones as for TRL's scripts, four in sections.

`{model}` and `{data}` are a tiny model and its pairs; batch sizes, lengths and steps are such that four steps take a
moment.
"""

_END = """
dataset_name: {data}
output_dir: data/out
max_length: 512
"""
_HUB = """
push_to_hub: true
hub_model_id: me/model
hub_strategy: every_save
"""

FLAT = {
    "zephyr_full": """
model_name_or_path: {model}
torch_dtype: bfloat16
attn_implementation: eager
dataset_num_proc: 12
bf16: false
beta: 0.01
do_eval: false
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
learning_rate: 5.0e-7
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_prompt_length: 256
num_train_epochs: 1
optim: adamw_torch
per_device_train_batch_size: 2
per_device_eval_batch_size: 8
save_strategy: steps
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
""" + _END + _HUB,
    "zephyr_qlora_as_lora": """
model_name_or_path: {model}
torch_dtype: float32
use_peft: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
beta: 0.01
disable_dropout: false
gradient_accumulation_steps: 1
learning_rate: 5.0e-6
logging_first_step: true
per_device_train_batch_size: 2
report_to: [none]
save_strategy: "no"
warmup_ratio: 0.1
""" + _END,
    "mixture_and_templates": """
model_name_or_path: {model}
dtype: float32
beta: 0.1
ddp_timeout: 5400
eval_strategy: "no"
learning_rate: 1.0e-6
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
num_train_epochs: 1
per_device_train_batch_size: 2
remove_unused_columns: true
overwrite_output_dir: true
save_steps: 0.5
use_liger_kernel: false
warmup_steps: 2
weight_decay: 0.01
""" + _END + _HUB,
    "evaluates": """
model_name_or_path: {model}
do_eval: true
eval_strategy: steps
eval_steps: 2
val_ratio: 0.2
learning_rate: 5.0e-7
per_device_train_batch_size: 2
per_device_eval_batch_size: 4
bf16_full_eval: false
load_best_model_at_end: true
metric_for_best_model: eval_loss
save_strategy: steps
save_steps: 2
""" + _END,
    "robust_to_noise": """
model_name_or_path: {model}
loss_type: robust
label_smoothing: 0.1
beta: 0.05
learning_rate: 1.0e-6
per_device_train_batch_size: 2
max_grad_norm: 1.0
adam_beta2: 0.98
optim: adamw_torch_fused
""" + _END,
    "several_losses": """
model_name_or_path: {model}
loss_type: [sigmoid, bco_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
learning_rate: 5.0e-7
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
precompute_ref_log_probs: true
""" + _END,
    "apo": """
model_name_or_path: {model}
loss_type: apo_zero
beta: 0.1
learning_rate: 5.0e-7
lr_scheduler_type: linear
per_device_train_batch_size: 2
dataloader_num_workers: 0
dataloader_pin_memory: true
tf32: false
""" + _END,
    "another_reference": """
model_name_or_path: {model}
ref_model_name_or_path: {model}
beta: 0.1
learning_rate: 5.0e-7
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
hub_private_repo: true
group_by_length: false
""" + _END,
    "dora_all_linear": """
model_name_or_path: {model}
use_peft: true
use_dora: true
lora_target_modules: all-linear
lora_task_type: CAUSAL_LM
lora_r: 4
learning_rate: 1.0e-5
padding_free: true
per_device_train_batch_size: 2
run_name: dora
""" + _END,
    "sgd_constant": """
model_name_or_path: {model}
optim: sgd
lr_scheduler_type: constant_with_warmup
learning_rate: 1.0e-3
warmup_ratio: 0.0
logging_strategy: steps
save_only_model: false
ignore_data_skip: false
per_device_train_batch_size: 2
""" + _END,
}  # fmt: skip

SECTIONED = {
    "tail_monitor": """
policy_name: {model}
ref_name: {model}
dataset:
  name: {data}
  max_len: 512
  seed: 7
dpo_training:
  dpo_beta: 0.1
  batch_size: 2
  learning_rate: 1e-5
  epochs: 1
tail_test: hoeffding
margin_plot: true
""",
    "model_and_training": """
model:
  name: {model}
  use_gradient_checkpointing: true
training:
  num_epochs: 1
  per_device_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 5.0e-7
  output_dir: out
data:
  path: {data}
  max_prompt_length: 256
logging:
  use_wandb: false
""",
    "workers": """
exp_name: dpo-run
logging_dir: ./logs
pretrain: {model}
train_data: {data}
sequence_length: 512
actor_train:
  training_args:
    learning_rate: 1.0e-6
    per_device_train_batch_size: 2
    gradient_accumulation_steps: 2
    warmup_steps: 2
  strategy_args:
    strategy_name: fsdp
""",
    "lora_section": """
model_path: {model}
data:
  path: {data}
lora:
  enabled: true
  r: 8
  alpha: 16
  dropout: 0.0
  target_modules: [q_proj, v_proj]
optimizer: adamw_torch
lr: 1e-5
lr_scheduler: cosine
grad_clip: 1.0
save_dir: out
max_seq_length: 512
""",
}
