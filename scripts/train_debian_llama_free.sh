#!/usr/bin/env bash
# Train checkpoints/debian-llama-free: a decoder-only model that translates German prompts, FREE's loss, on
# translations of the T5 checkpoint. An hour of one CPU core; run it again to continue after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/debian_training.sh
divide_batch 64

TEACHER=checkpoints/debian-t5-free
TARGETS=save/debian-distilled/predictions_test.jsonl
FLAGS=(
  --task translation --dataset_name debian_de_en --train_file "$TARGETS" --source_column source --target_column prediction
  --drop_long_samples True --max_source_length 36 --max_target_length 28
  --do_train --per_device_train_batch_size "$ROWS_EACH" --train_sampling_strategy group_by_length
  --weight_decay 0.01 --adam_beta2 0.98 --save_steps 50 --save_total_limit 2 --report_to tensorboard --disable_tqdm True
  "${FREE_LOSS[@]}" --shallow_loss_weight 0.5
)

[ -f save/debian-distilled/predict_results.json ] ||
  python run.py --model_name_or_path "$TEACHER" --task translation --dataset_name debian_de_en \
    --test_file data/debian/debian_de_en/train.jsonl.gz --drop_long_samples True --max_source_length 28 \
    --max_target_length 28 --val_max_target_length 32 --do_predict --per_device_eval_batch_size 16 \
    --report_to none --output_dir save/debian-distilled

[ -f save/debian-llama-start/model.safetensors ] ||
  launch run.py --config_name scripts/configs/debian_llama.json --tokenizer_name "$TEACHER" "${FLAGS[@]}" \
    --output_dir save/debian-llama-start --max_steps 350 --learning_rate 2.5e-3 \
    --lr_scheduler_type constant_with_warmup --warmup_steps 100 --seed 42

launch run.py --model_name_or_path save/debian-llama-start "${FLAGS[@]}" --output_dir save/debian-llama-free \
  --use_muon True --max_steps 480 --learning_rate 4e-3 --lr_scheduler_type cosine --warmup_steps 30 --seed 43 "$@"
