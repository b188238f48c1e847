# Sourced by run_*.sh: `experiment TASK DATASET MODEL CONFIG LAYERS MODE METHOD [flags]`.
#
#   MODE    train   the paper's settings; writes save/<data set>-<method>
#           eval    quality and latency, batch 1, of that folder (or of MODEL, if it is set)
#           smoke   two training steps of a tiny random model and an evaluation, offline, in half a minute
#   METHOD  free | lossless | calm | static | full
#
# LAYERS is FREE's exit and Static's depth where the checkpoint has no exit layer of its own. Lossless trains as
# FREE does; its evaluation takes FREE's model if there is none in its folder. MODEL, if set, is a checkpoint with or
# without an encoder; a smoke test makes its random model of that kind, and MODEL is then a folder or a config .json.
# DATA_DIR, if set, holds local files named <data set>.<split>.json(.gz) and the like, read instead of the hub. Further
# flags go to run.py and win over those set here. Paths given by the caller are relative to the caller's folder.
#
# ${NAME[@]+"${NAME[@]}"} is an array that may be empty: for the bash 3.2 of macOS, such a one is an unset variable.
source scripts/environment.sh
ROOT=$PWD
cd "$OLDPWD"

experiment() {
  local task=$1 dataset=$2 model=$3 config=$4 layers=$5 mode=${6:-} method=${7:-}
  local known='^(train|eval|smoke)/(free|lossless|calm|static|full)$'
  if [[ ! $mode/$method =~ $known ]]; then
    echo "error: usage: bash $0 {train|eval|smoke} {free|lossless|calm|static|full} [flags of run.py]" >&2
    exit 2
  fi
  shift 7
  local output=$ROOT/save/$dataset-$method data=(--task "$task" --dataset_name "$dataset")
  [ "$mode" != eval ] || take_trained_model
  if [ "$mode" = smoke ]; then layers=2; else layers=$(exit_layer "$model" "$layers"); fi
  choose_method "$method" "$layers"
  [ -z "${DATA_DIR:-}" ] || data+=(--data_dir "$DATA_DIR")
  "run_$mode" "$@"
}

take_trained_model() { # sets model; an evaluation of another model leaves results in such a folder as well
  local folder
  [ -z "${MODEL:-}" ] || return 0
  for folder in "$output" "${output%-lossless}-free"; do
    if [ -f "$folder/config.json" ] || [ -f "$folder/adapter_config.json" ]; then
      model=$folder
      return 0
    fi
    [ "$method" = lossless ] || return 0
  done
}

exit_layer() { # of a checkpoint's folder, else the second argument
  local found=
  [ ! -f "$1/exit_config.json" ] || found=$(sed -n 's/.*"shallow_exit_layer": *\([0-9]*\).*/\1/p' "$1/exit_config.json")
  echo "${found:-$2}"
}

choose_method() { # sets TRAINING and DECODING
  case $1 in
    free | lossless)
      TRAINING=(--intermediate_loss_fn shallowdeep_kd_dyna --shallow_exit_layer "$2" --distill_layer_alpha 0.5)
      DECODING=(--use_shallow_deep True --shallow_exit_layer "$2")
      [ "$1" = free ] || DECODING+=(--lossless True)
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
  launch "$ROOT/run.py" --model_name_or_path "$model" "${data[@]}" "${settings[@]}" \
    ${TRAINING[@]+"${TRAINING[@]}"} --do_train --output_dir "$output" --save_total_limit 2 --report_to tensorboard "$@"
}

run_eval() {
  python "$ROOT/run.py" --model_name_or_path "$model" "${data[@]}" ${DECODING[@]+"${DECODING[@]}"} \
    --do_eval --deploy_scenario True --per_device_eval_batch_size 1 --output_dir "$output" "$@"
}

run_smoke() {
  local scratch
  scratch=$(mktemp -d)
  trap "rm -rf '$scratch'" EXIT
  use_embedded_rows_without_data_dir
  config=$(smoke_config) || exit 2
  [ "$task" != question_answering ] || data+=(--doc_stride 16)
  python "$ROOT/run.py" --config_name "$config" --tokenizer_name "$ROOT/checkpoints/debian-t5-free" \
    "${data[@]}" ${TRAINING[@]+"${TRAINING[@]}"} ${DECODING[@]+"${DECODING[@]}"} \
    --do_train --do_eval --output_dir "$scratch" \
    --use_cpu --report_to none --max_steps 2 --per_device_train_batch_size 2 --max_train_samples 8 --max_eval_samples 3 \
    --max_source_length 96 --max_target_length 12 --save_strategy no \
    --deploy_scenario True --per_device_eval_batch_size 1 --disable_tqdm True "$@"
}

smoke_config() { # of the kind of MODEL, if it is set
  local named=${MODEL:-}
  [ ! -d "$named" ] || named=$named/config.json
  if [ -z "$named" ]; then
    echo "$ROOT/$config"
  elif [ ! -f "$named" ]; then
    echo "error: MODEL=$MODEL is no folder with a config.json, nor a config: a smoke test downloads nothing." >&2
    return 2
  elif grep -q '"is_encoder_decoder": *true' "$named"; then
    echo "$ROOT/$config"
  else
    echo "$ROOT/scripts/configs/smoke_llama.json"
  fi
}

use_embedded_rows_without_data_dir() { # sets data
  if [ -n "${DATA_DIR:-}" ]; then # some data sets come without a training split there
    local files=()
    shopt -s nullglob
    files=("$DATA_DIR/$dataset".train.* "$DATA_DIR/$dataset".validation.*)
    shopt -u nullglob
    [ ${#files[@]} -eq 0 ] || data+=(--train_file "${files[0]}")
  elif [ "$task" = translation ]; then
    data=(--task "$task" --dataset_name debian_de_en)
  elif [ "$task" = summarization ]; then
    data=(--task "$task" --dataset_name debian_synopsis)
  else
    data=(--task "$task" --data_dir "$ROOT/data/questions")
  fi
}
