#!/usr/bin/env bash
# Release the trained Debian runs of T5 and BART: write checkpoints/, compare the methods on them, write the model cards.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

export_run() { # name, title, origin, extra flags
  python scripts/export_checkpoint.py --run "save/debian-$1" --output_dir "checkpoints/debian-$1" \
    --title "$2" --train_script "scripts/train_debian_${1//-/_}.sh" --origin "$3" "${@:4}"
}

release() { # flags for the cards
  export_run t5-free "Debian De-En, T5, FREE" "save/debian-t5-teacher" \
    --earlier_runs save/debian-t5-start save/debian-t5-teacher ${1:+--sweep "$1" --model free}
  export_run t5-calm "Debian De-En, T5, CALM" "debian-t5-free" ${1:+--sweep "$1" --model calm}
  export_run bart-free "Debian De-En, BART, FREE" "random weights" ${2:+--sweep "$2" --model free}
}

release
bash scripts/quickstart.sh
python scripts/sweep.py --preset quickstart --free checkpoints/debian-bart-free --calm "" \
  --output_dir save/quickstart-bart
release save/quickstart save/quickstart-bart
