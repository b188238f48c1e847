#!/usr/bin/env bash
# German-English translation of Debian's package descriptions, with the embedded data and checkpoint.
# Usage: bash scripts/run_tr_debian.sh {train|eval|smoke} {free|lossless|calm|static|full} [flags of run.py]
# MODEL=... chooses another checkpoint, DATA_DIR=... local files: see scripts/experiment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/experiment.sh
experiment translation debian_de_en "${MODEL:-$PWD/checkpoints/debian-t5-free}" scripts/configs/smoke_t5.json 2 "$@"
