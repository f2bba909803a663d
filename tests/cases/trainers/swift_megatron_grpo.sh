# trainer: ms-swift
# expect stack = "megatron"
# expect task = "grpo"
# expect method.kind = "full"
# expect hardware = {"count": 8}
# expect sharding = {"kind": "zero1", "tp": 2, "sequence_parallel": true, "ep": 4, "etp": 1}
# expect batch = {"micro": 1, "seq_len": 3072, "accumulation": 4, "packing": false}
# expect rollout = {"generations": 8, "prompt_tokens": 2048, "completion_tokens": 1024, "sampler": "server"}
# expect reference = "model"
# finding IMP002
swift rollout --model acme/Qwen-7B &
NPROC_PER_NODE=8 \
megatron rlhf \
    --rlhf_type grpo \
    --model acme/Qwen-7B \
    --tensor_model_parallel_size 2 \
    --expert_model_parallel_size 4 \
    --expert_tensor_parallel_size 1 \
    --sequence_parallel true \
    --micro_batch_size 1 \
    --global_batch_size 16 \
    --use_vllm true \
    --vllm_mode server \
    --beta 0.001 \
    --max_length 2048 \
    --max_completion_length 1024 \
    --use_precision_aware_optimizer true
