# trainer: llamafactory
# expect task = "dpo"
# expect stack = "llamafactory-v1"
# expect method.kind = "full"
# finding CFG007
USE_V1=1 llamafactory-cli dpo --model acme/llama-3b --train_dataset acme/pairs \
  --micro_batch_size 2
