#!/usr/bin/env bash
# Compare full depth, Static-Exiting, CALM and FREE on real German-English test sentences with the embedded
# checkpoints: a table, a few sentences coloured by exit depth, and a page, save/quickstart/report.html.
# Needs python3 and pip only. Further flags go to scripts/sweep.py:  --num_samples 100
# Paths in them are relative to this repository.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

python scripts/sweep.py --preset quickstart "$@"
