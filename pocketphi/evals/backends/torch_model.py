"""Scoring on the torch model: the checkpoint, in the precision it is kept in.

Options are padded on the right and scored in batches; attention is causal, so what stands to the
right of a token cannot change it.

Legend: B sequences of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketphi import model as models
from pocketphi import tokenizer as tokenizers
from pocketphi.core.errors import EngineError
from pocketphi.evals.backends import model_file_sha256
from pocketphi.evals.backends.base import (
    Messages,
    OptionScore,
    Reply,
    cut_at_stop,
    fit_prompt,
    prompt_ids,
    start_tokens,
)
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.prompts import Request
from pocketphi.model.generation import stream

# Rows of logits held at a time: 256 rows of 32k float32 logits are 33 MB, of 200k 205 MB.
_ROWS = 256

# The tokens of one sequence of a batch.
Row = tuple[int, ...]


class TorchScorer:
    """A Hugging Face folder as a `Scorer`. On a GPU when there is one, else float32 on the CPU."""

    def __init__(self, folder: Path, config: EvalConfig) -> None:
        self._folder = folder
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # bfloat16 on a CPU is slower than float32 and rounds more.
        name = "bfloat16" if self._device.type == "cuda" else "float32"
        dtype = getattr(torch, name if config.dtype == "auto" else config.dtype)
        self._dtype = dtype
        self._model = models.load(folder, dtype=dtype, device=self._device).eval()
        self.tokenizer = tokenizers.load(folder)
        own = int(self._model.config.max_position_embeddings)
        self.max_tokens = min(own, config.max_context_tokens or own)
        self.start_ids, self.start_rule = start_tokens(self.tokenizer, config.start_token)
        self._batch = config.batch_size

    def identity(self) -> dict[str, Any]:
        return {
            "engine": "pocketphi.model (torch)",
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": self._device.type,
            "file": self._folder.name,
            "file_sha256": model_file_sha256(self._folder),
        }

    def score(self, requests: Iterable[Request]) -> Iterator[list[OptionScore]]:
        waiting = iter(requests)
        while batch := list(islice(waiting, self._batch)):
            rows: list[Row] = []
            places: list[list[int]] = []
            for request in batch:
                longest = max(len(o) for o in request.options)
                if len(request.context) + longest - 1 > self.max_tokens:
                    raise EngineError(
                        f"an option of {longest} tokens does not fit the context of {self.max_tokens} tokens"
                    )
                places.append(_place(request, rows))
            hidden_BTD = self._hidden(rows)
            for request, found in zip(batch, places):
                yield [self._read(hidden_BTD[b], request.context, o) for b, o in zip(found, request.options)]

    @torch.inference_mode()
    def rolling(self, ids: Sequence[int]) -> np.ndarray:
        hidden_TD = self._model.hidden(self._ids([list(ids[:-1])]))[0]
        return self._log_probabilities(hidden_TD, ids[1:])[0]

    def complete(
        self, texts: Iterable[str | Messages], *, chat: bool, max_new_tokens: int, stop: Sequence[str]
    ) -> Iterator[Reply]:
        for text in texts:
            ids = prompt_ids(self.tokenizer, self.start_ids, text, chat)
            prompt, room = fit_prompt(ids, max_new_tokens, self.max_tokens)
            yield self._continue(prompt, room, stop, len(ids) - len(prompt))

    def _continue(self, prompt: list[int], room: int, stop: Sequence[str], cut_tokens: int) -> Reply:
        # What goes on from a text keeps its first blank, as in the engine: a program's indentation.
        continuing = any(i not in self.tokenizer.special_ids for i in prompt)
        decoder = self.tokenizer.stream_decoder(continuing=continuing)
        text, produced = "", 0
        for token in stream(
            self._model, prompt, max_new_tokens=room, temperature=0.0, stop_ids=self.tokenizer.stop_ids
        ):
            produced += 1
            text += decoder.push(token)
            whole, stopped = cut_at_stop(text, stop)
            if stopped:
                return Reply(whole, "stop", produced, cut_tokens)
        whole, stopped = cut_at_stop(text + decoder.flush(), stop)
        ended = "length" if produced >= room and not stopped else "stop"
        return Reply(whole, ended, produced, cut_tokens)

    def close(self) -> None:
        del self._model

    @torch.inference_mode()
    def _hidden(self, rows: list[Row]) -> torch.Tensor:
        width = max(len(r) for r in rows)
        padded = [[*r, *[0] * (width - len(r))] for r in rows]
        return self._model.hidden(self._ids(padded), document_ids_BT=self._documents(rows, width))

    @torch.inference_mode()
    def _read(self, hidden_TD: torch.Tensor, context: Row, option: Row) -> OptionScore:
        start = len(context) - 1
        logprobs, top = self._log_probabilities(hidden_TD[start : start + len(option)], option)
        return OptionScore(float(logprobs.sum()), bool(top.all()))

    def _documents(self, rows: list[Row], width: int) -> torch.Tensor | None:
        """Document ids that set the padding apart, where a longer neighbour would change the rotation.

        LongRoPE picks its factors by length. Without this, a short row of a batch would be rotated
        as its longest neighbour is, and its score would depend on who else is in the batch.
        """
        limit = self._model.config.original_max_position_embeddings or 0
        lengths = [len(r) for r in rows]
        if not self._model.config.rope_scaling or width <= limit or min(lengths) > limit:
            return None
        return torch.tensor([[0] * n + [1] * (width - n) for n in lengths], device=self._device)

    def _log_probabilities(
        self, hidden_TD: torch.Tensor, targets: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        logprobs, likeliest = [], []
        for start in range(0, len(targets), _ROWS):
            logits_TV = self._head(hidden_TD[start : start + _ROWS]).float()
            wanted_T = torch.tensor(list(targets[start : start + _ROWS]), device=self._device)
            chosen_T = logits_TV.gather(1, wanted_T[:, None])[:, 0]
            logprobs.append((chosen_T - logits_TV.logsumexp(dim=1)).double().cpu().numpy())
            likeliest.append((chosen_T >= logits_TV.amax(dim=1)).cpu().numpy())
        whole = np.concatenate(logprobs)
        if not np.isfinite(whole).all():
            raise EngineError("the model returned logits that are not finite", hint="the model is damaged")
        return whole, np.concatenate(likeliest)

    def _head(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return self._model.lm_head(hidden_TD)

    def _ids(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self._device)


def _place(request: Request, rows: list[Row]) -> list[int]:
    """Add the rows that a request needs; return, option by option, the row it is read from.

    An option of one token is read where its context ends, so that the letters of a question share one
    row. It is never read from a row of a longer option: LongRoPE may rotate that one otherwise.
    """
    found, alone = [], -1
    for option in request.options:
        if len(option) > 1:
            found.append(len(rows))
            rows.append((*request.context, *option[:-1]))
            continue
        if alone < 0:
            alone = len(rows)
            rows.append(request.context)
        found.append(alone)
    return found
