"""The text decoder of a checkpoint that also holds a vision tower: read alone, and saved as the text model that it is.
"""
from support.model_config import Reader

PREFIXES = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head.": "lm_head."}
OTHER_PARTS = ("visual.", "vision_tower.", "multi_modal_projector.", "mtp.")      # mtp: heads that draft further tokens


class TextPart:
    """Names of the files of either kind of checkpoint (support.saving.Saves.from_disk)."""

    def from_disk(self, name: str) -> str | None:
        if name.removeprefix("model.").startswith(OTHER_PARTS):
            return None
        for theirs, ours in PREFIXES.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return super().from_disk(name)


def text_config(read: Reader, architecture: str) -> dict:
    """config.json as it is saved: one that other readers take for a text model."""
    return {**read.raw, "architectures": [architecture]}
