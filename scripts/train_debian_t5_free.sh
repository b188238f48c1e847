#!/usr/bin/env bash
# Train checkpoints/debian-t5-free from scratch: short German-English Debian descriptions, FREE's loss.
# A teacher, in two parts; its own best translations of the training sources as targets; a last run on them,
# in which the shallow exit learns to agree with the last layer. Two and a half hours on two CPU cores; run
# it again to continue after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/debian_training.sh

[ -f "$TOKENIZER/tokenizer.json" ] ||
  python scripts/train_tokenizer.py --dataset_name debian_de_en --vocab_size 4096 --output_dir "$TOKENIZER"

[ -f save/debian-t5-start/model.safetensors ] ||
  launch run.py --config_name scripts/configs/debian_t5.json --tokenizer_name "$TOKENIZER" \
    "${DEBIAN_FLAGS[@]}" "${FREE_LOSS[@]}" --output_dir save/debian-t5-start \
    --max_steps 2800 --learning_rate 4e-3 --warmup_steps 150 --label_smoothing_factor 0.1

[ -f save/debian-t5-teacher/model.safetensors ] ||
  launch run.py --model_name_or_path save/debian-t5-start \
    "${DEBIAN_FLAGS[@]}" "${FREE_LOSS[@]}" --output_dir save/debian-t5-teacher --shallow_loss_weight 0.5 \
    --max_steps 3400 --learning_rate 3e-3 --warmup_steps 100 --label_smoothing_factor 0.1 --seed 43

[ -f "$DISTILLED" ] ||
  python scripts/distill_targets.py --model_name_or_path save/debian-t5-teacher \
    --dataset_name debian_de_en --max_length 28 --output_file "$DISTILLED"

launch run.py --model_name_or_path save/debian-t5-teacher \
  "${DEBIAN_FLAGS[@]}" "${ON_DISTILLED[@]}" "${FREE_LOSS[@]}" --output_dir save/debian-t5-free \
  --shallow_loss_weight 0.5 --max_steps 1300 --learning_rate 2e-3 --warmup_steps 100 --seed 44 "$@"
