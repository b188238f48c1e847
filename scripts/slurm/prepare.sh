# Sourced by the .sbatch files: goes to the repository's root, from which they are submitted, and takes the
# environment that scripts/environment.sh finds or makes, one job at a time.
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f scripts/slurm/prepare.sh ]; then
  echo "error: submit from the repository's root, on a file system that all nodes see." >&2
  exit 2
fi
mkdir -p save
exec 9>save/.environment.lock
flock 9
source scripts/environment.sh
exec 9>&-

share_rows() { # starts scripts/$SCRIPT.py with what MODEL, DATASET and so on say, and the flags given
  local script=${SCRIPT:-sweep} data=(--dataset_name "${DATASET:-debian_de_en}" --task "${TASK:-translation}")
  [ -z "${DATA_DIR:-}" ] || data+=(--data_dir "$DATA_DIR")
  local model=${MODEL:?name a checkpoint} output=${OUTPUT_DIR:-save/$script}
  case $script in # the adaptive threshold learns from row to row: it is swept in one process
    sweep) model=(--free "$model" --methods "HF generate" Static FREE "FREE lossless" CALM) ;;
    calibrate) model=(--model_name_or_path "$model" --report_to none) ;;
    *) echo "error: SCRIPT is sweep or calibrate, not $script." >&2 && exit 2 ;;
  esac
  srun python "scripts/$script.py" "${model[@]}" "${data[@]}" --output_dir "$output" "$@"
}
