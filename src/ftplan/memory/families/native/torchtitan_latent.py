"""torchtitan's multi-head latent attention (DeepSeek V2 and V3).

Source: pytorch/torchtitan torchtitan/models/deepseek_v3/model.py, 0.3.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ftplan.memory import ops
from ftplan.memory.attention import Heads
from ftplan.memory.flex import flex_attention
from ftplan.memory.nn import Linear, Module
from ftplan.memory.tape import Tensor

__all__ = ["LatentAttention"]

Rotate = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class LatentAttention(Module):
    """Keys and values out of one narrow product, and positions on a part of each head.

    ``norm`` makes a norm of so many features; ``rotate`` puts positions on queries and keys.
    """

    def __init__(
        self, config: Mapping[str, Any], *, norm: Callable[[int], Module], rotate: Rotate
    ) -> None:
        super().__init__()
        hidden, count = config["hidden_size"], config["num_attention_heads"]
        self.plain, self.turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        self.rank, size = config["kv_lora_rank"], config["v_head_dim"]
        wide = self.plain + self.turned
        self.heads = Heads(count=count, kv_count=count, size=wide, value_size=size)
        self.rotate, self.narrow = rotate, config.get("q_lora_rank")
        if self.narrow:
            self.wq_a = Linear(hidden, self.narrow)
            self.q_norm = norm(self.narrow)
        self.wq = Linear(self.narrow or hidden, count * wide)
        self.wkv_a = Linear(hidden, self.rank + self.turned)
        self.kv_norm = norm(self.rank)
        self.wkv_b = Linear(self.rank, count * (self.plain + size))
        self.wo = Linear(count * size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        count = self.heads.count
        q = self._queries(x)
        q_nope, q_pe = ops.split(q, [count * self.plain, count * self.turned])
        kv, k_pe = ops.split(self.wkv_a.forward(x), [self.rank, self.turned])
        q_pe, k_pe = self.rotate(q_pe, k_pe, self.turned)
        q = ops.cat((q_nope, q_pe))
        kv = self.wkv_b.forward(self.kv_norm.forward(kv))
        k_nope, v = ops.split(kv, [count * self.plain, count * self.heads.value_size])
        k = ops.cat((k_nope, ops.expand_heads(k_pe, count, copied=False)))
        return self.wo.forward(flex_attention(q, k, v, self.heads))

    def _queries(self, x: Tensor) -> Tensor:
        if not self.narrow:
            return self.wq.forward(x)
        return self.wq.forward(self.q_norm.forward(self.wq_a.forward(x)))
