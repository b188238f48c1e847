#!/usr/bin/env bash
# Patent summarization on BIGPATENT (e: fixed constructions) with LongT5-base.
# Usage: bash scripts/run_sum_bigpatent.sh {train|eval|smoke} {free|lossless|calm|static|full} [flags of run.py]
# MODEL=... chooses another checkpoint, DATA_DIR=... local files: see scripts/experiment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/experiment.sh
experiment summarization big_patent "${MODEL:-google/long-t5-tglobal-base}" scripts/configs/smoke_longt5.json 6 "$@"
