# trainer: transformers
# expect method.kind = "full"
# expect batch = {"micro": 4, "seq_len": 1024, "accumulation": 2, "packing": false}
# expect precision = {"mixed": "bf16"}
# expect hardware.count = 8
# expect sharding.kind = "fsdp"
# expect gradient_checkpointing = {"kind": "full", "reentrant": false}
torchrun --nproc_per_node=8 --master_port 20001 train.py \
    --model_name_or_path acme/llama-7b --data_path data.json --bf16 True \
    --output_dir out --num_train_epochs 3 --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 2 --learning_rate 2e-5 --model_max_length 1024 \
    --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer \
    --gradient_checkpointing True
