"""Further families of models, one file each: a subclass of model.Transformer and a row of model_config.FAMILIES."""
from extras.families import qwen3_5  # noqa: F401
