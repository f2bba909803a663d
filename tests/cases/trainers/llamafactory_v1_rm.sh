# trainer: llamafactory
# expect task = "rm"
# expect stack = "llamafactory-v1"
# expect batch.micro = 2
# expect method.kind = "lora"
# finding CFG007
USE_V1=1 llamafactory-cli rm --model acme/llama-3b --train_dataset acme/pairs \
  --micro_batch_size 2 --peft_config '{"name": "lora", "r": 16}'
