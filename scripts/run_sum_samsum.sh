#!/usr/bin/env bash
# Dialogue summarization on SAMSum with T5-large.
# Usage: bash scripts/run_sum_samsum.sh {train|eval|smoke} {free|lossless|calm|static|full} [flags of run.py]
# MODEL=... chooses another checkpoint, DATA_DIR=... local files: see scripts/experiment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/experiment.sh
experiment summarization samsum "${MODEL:-google-t5/t5-large}" scripts/configs/smoke_t5.json 6 "$@"
