#!/usr/bin/env bash
# German-English translation on IWSLT 2017 with mT5-large.
# Usage: bash scripts/run_tr_iwslt.sh {train|eval|smoke} {free|lossless|calm|static|full} [flags of run.py]
# MODEL=... chooses another checkpoint, DATA_DIR=... local files: see scripts/experiment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/experiment.sh
experiment translation iwslt2017 "${MODEL:-google/mt5-large}" scripts/configs/smoke_mt5.json 6 "$@"
