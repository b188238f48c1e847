#!/usr/bin/env bash
# Release the two trained Debian runs: compare them, then write checkpoints/ with model cards.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

export_run() { # name, title, origin, extra flags
  python scripts/export_checkpoint.py --run "save/debian-t5-$1" --output_dir "checkpoints/debian-t5-$1" \
    --title "$2" --train_script "scripts/train_debian_t5_$1.sh" --origin "$3" "${@:4}"
}

release() { # extra flags
  export_run free "Debian De-En, T5, FREE" "random weights" "$@" ${REPORT:+--model free}
  export_run calm "Debian De-En, T5, CALM" "debian-t5-free" "$@" ${REPORT:+--model calm}
}

release
bash scripts/quickstart.sh
REPORT=save/quickstart/report.json
release --report "$REPORT"
