#!/usr/bin/env bash
# Train checkpoints/debian-t5-free from scratch: short German-English Debian descriptions, FREE's loss.
# Two CPU cores take about an hour and a half; run it again to continue after an interruption.
# Further flags are passed to run.py:  bash scripts/train_debian_t5_free.sh --max_steps 20000
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

TOKENIZER=save/debian-tokenizer
OUTPUT=save/debian-t5-free
[ -f "$TOKENIZER/tokenizer.json" ] ||
  python scripts/train_tokenizer.py --dataset_name debian_de_en --vocab_size 4096 --output_dir "$TOKENIZER"

launch run.py \
  --config_name scripts/configs/debian_t5.json --tokenizer_name "$TOKENIZER" \
  --task translation --dataset_name debian_de_en \
  --drop_long_samples True --max_source_length 28 --max_target_length 28 \
  --do_train --output_dir "$OUTPUT" \
  --intermediate_loss_fn shallowdeep_kd_dyna --shallow_exit_layer 2 --distill_layer_alpha 0.5 \
  --max_steps 2800 --per_device_train_batch_size $((96 / PROCESSES)) --train_sampling_strategy group_by_length \
  --use_muon True --learning_rate 4e-3 --weight_decay 0.01 --adam_beta2 0.98 \
  --lr_scheduler_type cosine --warmup_steps 150 --label_smoothing_factor 0.1 --bf16 \
  --seed 42 --ddp_find_unused_parameters False \
  --logging_steps 50 --eval_strategy steps --eval_steps 500 --per_device_eval_batch_size 64 \
  --save_steps 250 --save_total_limit 2 --report_to tensorboard --disable_tqdm True "$@"
