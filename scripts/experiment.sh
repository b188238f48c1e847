# Sourced by run_*.sh: `experiment TASK DATASET MODEL CONFIG LAYERS MODE METHOD [flags]`.
#
#   MODE    train   the paper's settings; writes save/<data set>-<method>
#           eval    quality and latency, batch 1, of that folder (or of MODEL, if it is set)
#           smoke   two training steps of a tiny random model and an evaluation, offline, in half a minute
#   METHOD  free | calm | static | full
#
# LAYERS is FREE's exit and Static's depth. DATA_DIR, if set, holds local files named <data set>.<split>.json(.gz)
# and the like, read instead of the hub. Further flags go to run.py and win over those set here. Paths given by
# the caller are relative to the caller's folder.
source scripts/environment.sh
ROOT=$PWD
cd "$OLDPWD"

experiment() {
  local task=$1 dataset=$2 model=$3 config=$4 layers=$5 mode=${6:-} method=${7:-}
  case "$mode/$method" in
    train/free | train/calm | train/static | train/full | eval/free | eval/calm | eval/static | eval/full) ;;
    smoke/free | smoke/calm | smoke/static | smoke/full) layers=2 ;;
    *)
      echo "error: usage: bash $0 {train|eval|smoke} {free|calm|static|full} [flags of run.py]" >&2
      exit 2
      ;;
  esac
  shift 7
  choose_method "$method" "$layers" "$mode"
  local output=$ROOT/save/$dataset-$method data=(--task "$task" --dataset_name "$dataset")
  [ -z "${DATA_DIR:-}" ] || data+=(--data_dir "$DATA_DIR")
  "run_$mode" "$@"
}

choose_method() { # sets TRAINING and DECODING
  case $1 in
    free)
      TRAINING=(--intermediate_loss_fn shallowdeep_kd_dyna --shallow_exit_layer "$2" --distill_layer_alpha 0.5)
      DECODING=(--use_shallow_deep True --shallow_exit_layer "$2")
      ;;
    calm)
      TRAINING=(--intermediate_loss_fn weighted_ce)
      DECODING=(--use_early_exit True --exit_min_layer $(($2 < 4 ? 1 : 4)))
      ;;
    static)
      TRAINING=(--intermediate_loss_fn weighted_ce)
      DECODING=(--static_exit_layer "$2")
      ;;
    full)
      TRAINING=()
      DECODING=()
      ;;
  esac
}

run_train() {
  local settings=(--paper_settings True)
  [[ $dataset == debian_* ]] && settings=(--learning_rate 1e-4 --max_steps 1000 --per_device_train_batch_size 32)
  launch "$ROOT/run.py" --model_name_or_path "$model" "${data[@]}" "${settings[@]}" "${TRAINING[@]}" \
    --do_train --output_dir "$output" --save_total_limit 2 --report_to tensorboard "$@"
}

run_eval() {
  # An evaluation of another model leaves results in that folder as well: does it hold a model?
  if [ -z "${MODEL:-}" ] && { [ -f "$output/config.json" ] || [ -f "$output/adapter_config.json" ]; }; then
    model=$output
  fi
  python "$ROOT/run.py" --model_name_or_path "$model" "${data[@]}" "${DECODING[@]}" \
    --do_eval --deploy_scenario True --per_device_eval_batch_size 1 --output_dir "$output" "$@"
}

run_smoke() {
  local scratch rows=()
  scratch=$(mktemp -d)
  trap "rm -rf '$scratch'" EXIT
  use_embedded_rows_without_data_dir
  python "$ROOT/run.py" --config_name "$ROOT/$config" --tokenizer_name "$ROOT/checkpoints/debian-t5-free" \
    "${data[@]}" "${rows[@]}" "${TRAINING[@]}" "${DECODING[@]}" --do_train --do_eval --output_dir "$scratch" \
    --use_cpu --report_to none --max_steps 2 --per_device_train_batch_size 2 --max_train_samples 8 --max_eval_samples 3 \
    --max_source_length 96 --max_target_length 12 --doc_stride 16 --save_strategy no \
    --deploy_scenario True --per_device_eval_batch_size 1 --disable_tqdm True "$@"
}

use_embedded_rows_without_data_dir() { # sets rows and data
  if [ -n "${DATA_DIR:-}" ]; then # some data sets come without a training split there
    local files=()
    shopt -s nullglob
    files=("$DATA_DIR/$dataset".train.* "$DATA_DIR/$dataset".validation.*)
    shopt -u nullglob
    [ ${#files[@]} -eq 0 ] || rows=(--train_file "${files[0]}")
  elif [ "$task" = translation ]; then
    data=(--task "$task" --dataset_name debian_de_en)
  elif [ "$task" = summarization ]; then
    data=(--task "$task" --dataset_name debian_synopsis)
  else
    data=(--task "$task" --data_dir "$ROOT/data/questions")
  fi
}
