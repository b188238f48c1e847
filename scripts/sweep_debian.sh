#!/usr/bin/env bash
# The trade-off of every method on the embedded data and checkpoints: sweeps at batch 1 and over batch sizes,
# then one page of figures, save/report/report.html. Half an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

data=(--dataset_name debian_de_en --drop_long_samples True --max_source_length 28 --max_target_length 28
  --val_max_target_length 56 --threads 1 --backend torch --resume_eval True)
checkpoints=(--free checkpoints/debian-t5-free --calm checkpoints/debian-t5-calm)

mkdir -p save/sweep
[ -f save/sweep/shortlist.json ] || python scripts/learn_shortlist.py --model_name_or_path checkpoints/debian-t5-free \
  --dataset_name debian_de_en --size 500 --output_file save/sweep/shortlist.json
python scripts/sweep.py "${checkpoints[@]}" "${data[@]}" --num_samples 300 --output_dir save/sweep \
  --static_layers 1 2 3 4 6 --exit_layers 2 4 6 --conf_shortlist save/sweep/shortlist.json
python scripts/sweep.py "${checkpoints[@]}" "${data[@]}" --num_samples 160 --output_dir save/throughput \
  --batch_sizes 1 2 4 8 16 --static_layers 2 --free_thresholds 0.1 0.4 --lossless_thresholds 0.4 \
  --adapt_zetas 0.8 --calm_thresholds 0.9
python scripts/report.py save/sweep save/throughput --output_dir save/report
