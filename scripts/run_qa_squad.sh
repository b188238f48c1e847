#!/usr/bin/env bash
# Question answering on SQuAD 1.1 with T5-large.
# Usage: bash scripts/run_qa_squad.sh {train|eval|smoke} {free|lossless|calm|static|full} [flags of run.py]
# MODEL=... chooses another checkpoint, DATA_DIR=... local files: see scripts/experiment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/experiment.sh
experiment question_answering squad "${MODEL:-google-t5/t5-large}" scripts/configs/smoke_t5.json 6 "$@"
