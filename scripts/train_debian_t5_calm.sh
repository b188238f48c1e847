#!/usr/bin/env bash
# Train checkpoints/debian-t5-calm: the weights of the FREE run, tuned with a loss at every layer (CALM).
# Run scripts/train_debian_t5_free.sh first; run this again to continue after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

launch run.py \
  --model_name_or_path "${MODEL:-save/debian-t5-free}" \
  --task translation --dataset_name debian_de_en \
  --drop_long_samples True --max_source_length 28 --max_target_length 28 \
  --do_train --output_dir save/debian-t5-calm \
  --intermediate_loss_fn weighted_ce \
  --max_steps 300 --per_device_train_batch_size $((96 / PROCESSES)) --train_sampling_strategy group_by_length \
  --use_muon True --learning_rate 1e-3 --weight_decay 0.01 --adam_beta2 0.98 \
  --lr_scheduler_type cosine --warmup_steps 30 --label_smoothing_factor 0.1 --bf16 \
  --seed 42 --ddp_find_unused_parameters False \
  --logging_steps 50 --eval_strategy steps --eval_steps 100 --per_device_eval_batch_size 64 \
  --save_steps 100 --save_total_limit 2 --report_to tensorboard --disable_tqdm True "$@"
