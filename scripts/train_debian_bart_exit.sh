#!/usr/bin/env bash
# Teach checkpoints/debian-bart-exit: an exit behind layer 1 of checkpoints/debian-bart-free, whose weights stay as they
# are. Minutes of two CPU cores; run it again to continue after an interruption. Flags go to scripts/train_exit.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 scripts/train_exit.py \
  --model_name_or_path checkpoints/debian-bart-free --task translation --dataset_name debian_de_en \
  --max_train_samples 8000 --held_out 150 --max_source_length 28 --val_max_target_length 32 \
  --generation_batch_size 64 --threads 1 --exit_layers 1 --shortlist_size 2048 --batch_tokens 2048 \
  --max_steps 1000 --output_dir save/debian-bart-exit "$@"
