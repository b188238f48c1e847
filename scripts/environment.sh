# Sourced by the scripts: takes the active environment if it has what requirements.txt asks for, else .venv, which
# it makes, and brings up to date whenever requirements.txt or constraints.txt has changed; and defines `launch`,
# which starts a Python script on every GPU that is for this process, or on every CPU core where there is none.

is_other_environment() { # whether one is active that is not .venv
  [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ ! "${VIRTUAL_ENV:-}" -ef .venv ]
}

make_venv() {
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $(command -v python3) is older than Python 3.11, which the libraries need: activate a newer one." >&2
    exit 2
  fi
  python3 -m venv .venv
}

update_venv() { # .venv/.installed holds the two files as they were installed
  if ! cat requirements.txt constraints.txt | cmp -s - .venv/.installed; then
    [ -x .venv/bin/python ] || make_venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
    cat requirements.txt constraints.txt >.venv/.installed
  fi
}

if ! is_other_environment || ! python scripts/check_requirements.py; then
  update_venv
  source .venv/bin/activate
fi
export TOKENIZERS_PARALLELISM=false HF_DATASETS_DISABLE_PROGRESS_BARS=1

count_processes() { # sets GPUS and PROCESSES
  GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') # CUDA_VISIBLE_DEVICES, ROCm
  # nproc knows of cores that are not for this process, but takes OMP_NUM_THREADS for its answer; macOS has none
  PROCESSES=$GPUS
  [ "$GPUS" -gt 0 ] || PROCESSES=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
}

divide_batch() { # ROWS over as many processes as divide them, so that a step is the same anywhere: sets ROWS_EACH
  [ -n "${PROCESSES:-}" ] || count_processes
  while [ $(($1 % PROCESSES)) -ne 0 ]; do PROCESSES=$((PROCESSES - 1)); done
  ROWS_EACH=$(($1 / PROCESSES))
}

launch() { # with RENDEZVOUS=host:port, as one of NODES nodes that meet there
  local meeting=(--standalone)
  [ -z "${RENDEZVOUS:-}" ] || meeting=(--nnodes "${NODES:?}" --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS"
    --rdzv_id "${RENDEZVOUS_ID:-exitlm}")
  [ -n "${PROCESSES:-}" ] || count_processes
  if [ "$GPUS" -gt 0 ]; then
    torchrun "${meeting[@]}" --nproc_per_node "$PROCESSES" "$@"
  else # one thread a process: small models scale better over processes than over threads
    OMP_NUM_THREADS=1 torchrun "${meeting[@]}" --nproc_per_node "$PROCESSES" "$@" --use_cpu --ddp_backend gloo
  fi
}
