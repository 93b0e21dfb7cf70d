"""LoRA in a whole run: adapters are trained, the merged weights are saved."""
import torch
from safetensors.torch import load_file

import train
from support.weights import load_model


def test_lora_run_saves_a_merged_checkpoint(command, tmp_path, pair):
    """fails if: other weights than the adapters are trained, or the adapter is saved apart or unscaled."""
    assert train.main(command(lora_rank=2, lora_alpha=4.0, lr=0.1)) == 0
    folder = tmp_path / "runs/a/last"
    base, merged, kept = (load_file(path) for path in (
        pair / "student/model.safetensors", folder / "model.safetensors", folder / "trainer.safetensors"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert set(merged) == set(base) and changed == {name for name in base if "proj" in name}
    for name in changed:
        stem = "weight/" + name.removesuffix(".weight")
        adapter = kept[f"{stem}.lora_B"] @ kept[f"{stem}.lora_A"]
        torch.testing.assert_close(merged[name], base[name] + 4.0 / 2 * adapter)
    assert all("lora_" in name for name in kept) and load_model(folder).config.hidden_size == 16
