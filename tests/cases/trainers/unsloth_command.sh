# trainer: unsloth
# expect method.kind = "qlora"
# expect method.rank = 64
# expect batch.seq_len = 8192
# expect gradient_checkpointing = {"kind": "offload", "reentrant": true}
python unsloth-cli.py --model_name "acme/llama-3-8b" --max_seq_length 8192 --load_in_4bit \
  --r 64 --lora_alpha 32 --use_gradient_checkpointing unsloth --optim adamw_8bit
