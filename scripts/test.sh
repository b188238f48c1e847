#!/usr/bin/env bash
# Lint and test: makes .venv if need be, then runs ruff, mypy and pytest. Flags go to pytest: `-m "not slow"` leaves
# the long tests out.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
