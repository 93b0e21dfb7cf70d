"""Families: model types beyond those of model.py. Each file adds its rows to support.model_config.FAMILIES, which says
how its config.json is read, and to model.MODELS, the class: a Transformer with other layers.
"""
from extras.families import gemma3, olmo, phi3, qwen3_5, qwen3_5_memory, qwen3_moe, sliding, smollm3  # noqa: F401
