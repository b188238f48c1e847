#!/usr/bin/env bash
# Compare full depth, Static-Exiting, CALM and FREE on real German-English test sentences with the embedded
# checkpoints: one table, a few sentences coloured by exit depth, and save/quickstart/report.{json,csv,png}.
# Needs python3 and pip only. Further flags go to scripts/compare.py:  --num_samples 100
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

python scripts/compare.py --free checkpoints/debian-t5-free --calm checkpoints/debian-t5-calm \
  --num_samples 300 --threads 1 --output_dir save/quickstart "$@"
