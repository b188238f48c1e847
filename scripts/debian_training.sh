# Sourced by train_debian_*.sh: what their runs share, as DEBIAN_FLAGS. Two CPU cores are enough for them.
source scripts/environment.sh
divide_batch 96

TOKENIZER=save/debian-tokenizer
DISTILLED=save/distilled.jsonl.gz
DEBIAN_FLAGS=(
  --task translation --dataset_name debian_de_en
  --drop_long_samples True --max_source_length 28 --max_target_length 28
  --do_train --per_device_train_batch_size "$ROWS_EACH" --train_sampling_strategy group_by_length
  --use_muon True --weight_decay 0.01 --adam_beta2 0.98 --lr_scheduler_type cosine --bf16
  --seed 42 --ddp_find_unused_parameters False
  --logging_steps 50 --save_steps 250 --save_total_limit 2 --report_to tensorboard --disable_tqdm True
)
FREE_LOSS=(--intermediate_loss_fn shallowdeep_kd_dyna --shallow_exit_layer 2 --distill_layer_alpha 0.5)
ON_DISTILLED=(--train_file "$DISTILLED" --source_column source --target_column target)
