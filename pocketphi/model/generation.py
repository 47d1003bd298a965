"""Plain reference generation with a cache, one sequence at a time.

Rows of a batch never meet: the same prompt and seed give the same tokens whatever else is asked for.

Shape legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pocketphi.core.errors import UserError
from pocketphi.model.attention import KVCache
from pocketphi.model.transformer import PhiForCausalLM


def generate(
    model: PhiForCausalLM,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
) -> list[int]:
    """Return the tokens that follow `ids`, up to but without the stop token.

    Temperature 0 takes the most probable token. Filters apply in the order top_k, top_p, min_p, on
    probabilities after the temperature. Raises UserError for an empty prompt or no room to answer.
    """
    return list(
        stream(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop_ids=stop_ids,
        )
    )


def stream(
    model: PhiForCausalLM,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
) -> Iterator[int]:
    """Yield the tokens of `generate` one by one; a full context ends the text."""
    config = model.config
    prompt = [int(i) for i in ids]
    if not prompt:
        raise UserError("the prompt has no tokens")
    bad = [i for i in prompt if not 0 <= i < config.vocab_size]
    if bad:
        raise UserError(f"token id {bad[0]} is not in the model's vocabulary of {config.vocab_size}")
    room = config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model's context is {config.max_position_embeddings}"
        )
    device = model.lm_head.weight.device
    stops = frozenset(model.stop_ids if stop_ids is None else stop_ids)
    generator = torch.Generator("cpu").manual_seed(seed)
    cache = KVCache(config)
    fresh = torch.tensor([prompt], device=device)
    for _ in range(min(max_new_tokens, room)):
        with torch.no_grad():
            hidden_BTD = model.hidden(fresh, cache=cache)
            logits_V = model.lm_head(hidden_BTD[:, -1:])[0, -1].float().cpu()
        if not torch.isfinite(logits_V).all():
            raise UserError(f"the model gave logits that are not finite after {cache.length} tokens")
        token = sample(logits_V, generator, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if token in stops:
            return
        yield token
        fresh = torch.tensor([[token]], device=device)


def sample(
    logits_V: Tensor,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Draw one token id from float32 logits."""
    if temperature <= 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V.double() / temperature, dim=-1)
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    keep_V = torch.ones_like(sorted_V, dtype=torch.bool)
    if top_k > 0:
        keep_V[top_k:] = False
    if top_p < 1:
        # A token is kept while the mass *before* it is below top_p, so the first always is.
        kept_V = sorted_V * keep_V
        kept_V = kept_V / kept_V.sum()
        keep_V &= kept_V.cumsum(0) - kept_V < top_p
    if min_p > 0:
        keep_V &= sorted_V >= min_p * sorted_V[0]
    weights_V = sorted_V * keep_V
    threshold = torch.rand((), generator=generator, dtype=torch.float64) * weights_V.sum()
    index = int(torch.searchsorted(weights_V.cumsum(0), threshold, right=True))
    return int(order_V[min(index, int(keep_V.sum()) - 1)])
