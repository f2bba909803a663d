# trainer: ms-swift
# expect stack = "ms-swift"
# expect model.name = "acme/Qwen-7B"
# expect method.kind = "qlora"
# expect precision.weights = "nf4"
# expect batch.accumulation = 8
# expect hardware.count = 2
# expect sharding.kind = "zero2"
# expect sharding.offload = "optimizer"
# expect sharding.bucket_elements = 200000000
# finding IMP001 at 16
# assumed gradient_checkpointing.kind
nproc_per_node=2
CUDA_VISIBLE_DEVICES=0,1 \
NPROC_PER_NODE=$nproc_per_node \
swift sft \
    --model acme/Qwen-7B \
    --tuner_type lora \
    --dataset 'acme/data#500' \
              'acme/more' \
    --quant_method bnb \
    --quant_bits 4 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \
    --target_modules all-linear \
    --max_length 2048 \
    --deepspeed zero2_offload
