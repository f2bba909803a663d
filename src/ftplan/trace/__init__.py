"""The annex: a job run for real on fake tensors, or measured on a GPU (extra ``trace``).

Only the door imports this package, inside its commands; importing it loads no torch.
"""

from __future__ import annotations
