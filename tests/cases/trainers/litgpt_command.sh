# trainer: litgpt
# expect model.name = "acme/phi-2"
# expect method.kind = "qlora"
# expect precision.weights = "nf4"
# expect method.double_quant = true
# expect optimizer = "paged_adamw_32bit"
# expect hardware.count = 1
# expect batch.seq_len = 256
# assumed method.targets
litgpt finetune_lora acme/phi-2 --quantize bnb.nf4-dq --precision bf16-true --train.max_seq_length 256
