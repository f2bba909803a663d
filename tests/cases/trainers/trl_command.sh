#!/bin/bash
# trainer: trl
# expect task = "dpo"
# expect model.name = "acme/qwen-0.5b"
# expect method.kind = "dora"
# expect batch.micro = 2
# expect hardware = {"count": 4, "nodes": 2}
# expect sharding.kind = "zero3"
# expect precision = {"weights": "bf16", "mixed": "bf16"}
# expect reference = "adapter"
ARGS=(
  --model_name_or_path acme/qwen-0.5b
  --per-device-train-batch-size=2
)
srun accelerate launch --use_deepspeed --zero_stage 3 --num_machines 2 --num_processes 8 \
  trl/scripts/dpo.py "${ARGS[@]}" \
  --dtype bfloat16 --use_peft --use_dora --lora_target_modules q_proj v_proj \
  --max_length 2048 --output_dir out > log.txt 2>&1 &
