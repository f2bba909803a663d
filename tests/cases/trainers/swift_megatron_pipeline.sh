# trainer: ms-swift
# expect stack = "megatron"
# expect sharding = {"kind": "zero1", "tp": 2, "pp": 2, "schedule": "interleaved", "virtual_stages": 2}
# expect hardware = {"count": 8}
NPROC_PER_NODE=8 \
megatron sft \
    --model acme/Qwen-7B \
    --tensor_model_parallel_size 2 \
    --pipeline_model_parallel_size 2 \
    --virtual_pipeline_model_parallel_size 2 \
    --micro_batch_size 1 \
    --global_batch_size 16 \
    --max_length 2048
