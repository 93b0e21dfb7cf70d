"""TRL's GKDTrainer and DistillationTrainer as the benchmarks drive them: exact reverse KL on the student's own samples.

The settings are the fastest found on a CPU: no gradient checkpointing unless a caller asks for it, nothing logged or
saved, no worker processes, the KV cache that grows (a static one takes longer) and torch's fused attention (eager
attention is as fast on the toy pair and slower on anything larger). Prompts are asked in the order given.
"""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")        # nothing is loaded by name, and no telemetry is sent

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

SETTINGS = dict(temperature=1.0, beta=1.0, gradient_checkpointing=False, report_to=[], save_strategy="no",
                logging_strategy="no", logging_nan_inf_filter=False, disable_tqdm=True, dataloader_num_workers=0,
                dataloader_pin_memory=False)


def build(kind: str, student, teacher, tokenizer, prompts: list[str], max_new_tokens: int, settings: dict, callbacks,
          optimizers=(None, None)):
    """The trainer of a kind, "distillation" or "gkd...". settings: of transformers' TrainingArguments, and SETTINGS
    where they say nothing."""
    settings, common = SETTINGS | settings, dict(model=student, teacher_model=teacher, processing_class=tokenizer,
                                                 callbacks=callbacks, optimizers=optimizers)
    if kind == "distillation":
        from trl import DistillationConfig, DistillationTrainer
        return DistillationTrainer(
            **common, train_dataset=Dataset.from_dict({"prompt": prompts}),
            args=DistillationConfig(**settings, max_completion_length=max_new_tokens, shuffle_dataset=False))
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    trainer = GKDTrainer(
        **common, train_dataset=Dataset.from_dict({"ids": tokenizer(prompts)["input_ids"]}),
        data_collator=lambda rows: collate([row["ids"] for row in rows], tokenizer.pad_token_id),
        args=GKDConfig(**settings, lmbda=1.0, max_new_tokens=max_new_tokens, train_sampling_strategy="sequential"))
    # otherwise its loss is divided by the number of tokens that stand in the labels before it samples, not of those
    # that it sampled
    trainer.model_accepts_loss_kwargs = False
    return trainer


def collate(ids: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Prompts, padded on the left; GKDTrainer puts the student's responses behind them."""
    prompts, mask = (pad_sequence([torch.tensor(row) for row in rows], True, value, padding_side="left")
                     for rows, value in ((ids, pad), ([[1] * len(row) for row in ids], 0)))
    return {"input_ids": prompts, "attention_mask": mask, "labels": prompts, "prompts": prompts,
            "prompt_attention_mask": mask}
