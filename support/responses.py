"""Responses that nobody sampled here, in the shape of a rollout."""
import torch

from rollout import Rollout, assemble


def from_responses(prompts: list[list[int]], responses: list[list[int]], finished: list[bool], device) -> Rollout:
    """Given responses (stop token included) in the shape of a rollout. Nobody sampled them, so logp and entropy are 0
    and mean nothing: only losses that never look at the behaviour policy may use such rows."""
    texts = [torch.tensor(response, dtype=torch.int64) for response in responses]
    zeros = [torch.zeros(len(text)) for text in texts]
    return assemble(prompts, texts, zeros, zeros, finished, device)
