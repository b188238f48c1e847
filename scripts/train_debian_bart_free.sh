#!/usr/bin/env bash
# Train checkpoints/debian-bart-free from scratch, on the distilled targets of the T5 run.
# Run scripts/train_debian_t5_free.sh first; run this again to continue after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/debian_training.sh

launch run.py --config_name scripts/configs/debian_bart.json --tokenizer_name "$TOKENIZER" \
  "${DEBIAN_FLAGS[@]}" "${ON_DISTILLED[@]}" "${FREE_LOSS[@]}" --output_dir save/debian-bart-free \
  --shallow_loss_weight 0.5 --max_steps 600 --learning_rate 4e-3 --warmup_steps 150 "$@"
