#!/usr/bin/env bash
# Train checkpoints/debian-t5-calm: the weights of the FREE run, tuned with a loss at every layer (CALM).
# Run scripts/train_debian_t5_free.sh first; run this again to continue after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/debian_training.sh

launch run.py --model_name_or_path save/debian-t5-free \
  "${DEBIAN_FLAGS[@]}" "${ON_DISTILLED[@]}" --output_dir save/debian-t5-calm \
  --intermediate_loss_fn weighted_ce --max_steps 200 --learning_rate 1e-3 --warmup_steps 20 --seed 44 "$@"
