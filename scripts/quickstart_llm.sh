#!/usr/bin/env bash
# Show what exits do to a decoder-only model, SmolLM2-135M-Instruct: what each layer would have said, all methods beside
# Hugging Face's generate, early-exit drafts and prompt lookup, and an answer coloured by exit depth.
# Needs python3 and pip only. Further flags go to scripts/quickstart_llm.py:  --prompts 8 --precision fp32
# Paths in them are relative to this repository.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

python scripts/quickstart_llm.py "$@"
