"""Prompt, retrieve or finetune, and whether the job fits the GPU."""

__version__ = "0.1.0"
