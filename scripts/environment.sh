# Sourced by the scripts: takes the active virtual environment if it has what requirements.txt asks for, else
# .venv, which it makes from that file when it is missing or older; and defines `launch`, which starts a Python
# script on every GPU, or on every CPU core where there is none.

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! python scripts/check_requirements.py; then
  if [ ! -f .venv/.installed ] || [ requirements.txt -nt .venv/.installed ]; then
    echo "Making .venv from requirements.txt: some minutes" >&2
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    touch .venv/.installed
  fi
  source .venv/bin/activate
fi
export TOKENIZERS_PARALLELISM=false HF_DATASETS_DISABLE_PROGRESS_BARS=1

GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
PROCESSES=$((GPUS > 0 ? GPUS : $(nproc)))

launch() {
  if [ "$GPUS" -gt 0 ]; then
    torchrun --standalone --nproc_per_node "$PROCESSES" "$@"
  else # one thread a process: small models scale better over processes than over threads
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node "$PROCESSES" "$@" --use_cpu --ddp_backend gloo
  fi
}
