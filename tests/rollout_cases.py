"""What the tests of the sampler share: a small scrambled llama that writes from ragged prompts. Token 0, the value of
the padding, is also a stop token.
"""
import torch

from model import Transformer
from rollout import generate
from support.model_config import ModelConfig


VOCAB, CONTEXT = 60, 80
PROMPT_LENGTHS = (3, 17, 9, 1, 30, 5, 5)
LIMITS = [5, 40, 30, 50, 20, 10, 1]
STOPS = (0, 7, 11)


def small(seed=0, **more):
    config = dict(model_type="llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=CONTEXT, **more)
    model, rng = Transformer(ModelConfig.from_dict(config)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15 if p.dim() > 1 else 0.3, generator=rng)
    return model.eval()


def ragged(lengths=PROMPT_LENGTHS):
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=rng).tolist() for n in lengths]


def write(model, prompts=None, **changes):
    """Seven ragged prompts with their own limits, three samples each, five slots, unless changed."""
    options = dict(samples=3, max_new_tokens=LIMITS, stop_ids=STOPS, seed=3, slots=5)
    return generate(model, prompts or ragged(), **{**options, **changes})


def texts(rollout):
    return [rollout.response(b) for b in range(len(rollout.tokens_BT))]


@torch.no_grad()
def scored(model, rollout, temperature=1.0, vocab_size=VOCAB):
    """logp_N and entropy_N of the sampled tokens, from plain passes over one unpadded sequence at a time."""
    logps, entropies = [], []
    for b, start in enumerate(rollout.prompt_len_B.tolist()):
        response = torch.tensor(rollout.response(b))
        sequence = torch.cat([rollout.tokens_BT[b, :start], response])
        hidden = model(sequence[None])[0, start - 1:-1]
        logp_NV = (model.logits(hidden)[:, :vocab_size] / temperature).log_softmax(-1)
        logps.append(logp_NV[torch.arange(len(response)), response])
        entropies.append(torch.distributions.Categorical(logits=logp_NV).entropy())
    return torch.cat(logps), torch.cat(entropies)


def same(a, b):
    return torch.equal(a.tokens_BT, b.tokens_BT) and torch.equal(a.mask_BT, b.mask_BT)
