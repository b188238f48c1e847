#!/usr/bin/env bash
# Judge one or two prediction files with a language model: make the requests, run them, score the answers.
#   export OPENAI_API_KEY=...
#   DATASET=debian_synopsis MODEL=gpt-4o-mini bash gpt_eval/gpt_eval.sh NAME=FILE [NAME=FILE] [flags of `run`]
# Also from the environment: BASE_URL, SPLIT, NUM_SAMPLES, OUTPUT_DIR. The same command continues after an
# interruption. Try `--dry_run` first: it prints what the rest would cost. More flags: python -m gpt_eval make -h
# Paths are relative to the caller's folder.
set -euo pipefail
cd "$(dirname "$0")/.."

predictions=()
while [[ $# -gt 0 && $1 != -* ]]; do predictions+=("$1"); shift; done
if [ ${#predictions[@]} -eq 0 ] || [ -z "${DATASET:-}" ] || [ -z "${MODEL:-}" ]; then
  echo "usage: DATASET=name MODEL=name bash gpt_eval/gpt_eval.sh NAME=FILE [NAME=FILE] [flags of run]" >&2
  exit 2
fi
source scripts/environment.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
cd "$OLDPWD"

OUTPUT_DIR=${OUTPUT_DIR:-save/gpt_eval}
requests=(--requests "$OUTPUT_DIR/requests.jsonl")
answers=(--answers "$OUTPUT_DIR/answers.jsonl")

python -m gpt_eval make "${requests[@]}" --predictions "${predictions[@]}" --dataset_name "$DATASET" \
  --split "${SPLIT:-test}" ${NUM_SAMPLES:+--num_samples "$NUM_SAMPLES"}
status=0
python -m gpt_eval run "${requests[@]}" "${answers[@]}" --model "$MODEL" ${BASE_URL:+--base_url "$BASE_URL"} "$@" ||
  status=$?
[ $status -le 1 ] || exit $status # 1: some requests failed for good; the others' answers are scored
case " ${*//dry-run/dry_run} " in
  *" --dry_run False "* | *" --dry_run=False "*) ;;
  *" --dry_run"*) exit 0 ;;
esac
python -m gpt_eval score "${requests[@]}" "${answers[@]}" --output_dir "$OUTPUT_DIR"
exit $status
