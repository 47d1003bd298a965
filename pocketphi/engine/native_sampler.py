"""Sampling in the native core: the tokens that `sampler.Sampler` chooses, hundreds of times as fast.

The logits stay where the core wrote them: Python hands their address on and gets one token back.
"""

from __future__ import annotations

import ctypes
from array import array
from ctypes import c_double, c_float, c_int32, c_uint64, c_void_p

import numpy as np

from pocketphi.core.errors import EngineError
from pocketphi.engine.sampler import NOT_FINITE_HINT, Choice, Sampler


class NativeSampling(ctypes.Structure):
    """`pp_sampling` of native/include/pocketphi.h."""

    _fields_ = [
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("top_k", c_int32),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("seed", c_uint64),
        ("bias_ids", c_void_p),
        ("bias", c_void_p),
        ("num_bias", c_int32),
    ]


class _Scored(ctypes.Structure):
    _fields_ = [("id", c_int32), ("logprob", c_double)]


class NativeChoice(ctypes.Structure):
    """`pp_choice` of native/include/pocketphi.h."""

    _fields_ = [
        ("logits", c_void_p),
        ("vocab_size", c_int32),
        ("num_prompt", c_int32),
        ("num_answer", c_int32),
        ("num_top", c_int32),
        ("prompt", c_void_p),
        ("answer", c_void_p),
        ("mask", c_void_p),
        ("top", c_void_p),
        ("token", c_int32),
        ("logprob", c_double),
    ]


_MOST = 2**31 - 1


class NativeSampler(Sampler):
    """Chooses the tokens that `plain`, which has chosen none yet, would choose, with the same errors."""

    def __init__(self, lib: ctypes.CDLL, plain: Sampler) -> None:
        sampling, prompt = plain.sampling, plain.prompt
        super().__init__(
            sampling,
            prompt,
            plain.vocab_size,
            token_mask=plain._token_mask,
            num_logprobs=plain._num_logprobs,
        )
        self._lib = lib
        self._ids = array("i")  # the answer, as the core reads it
        self._prompt_ids = np.array(prompt, np.int32)
        self._bias_ids = np.array(list(sampling.logit_bias), np.int32)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)
        self._how = NativeSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=min(sampling.top_k, _MOST),
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed & (2**64 - 1),
            bias_ids=self._bias_ids.ctypes.data,
            bias=self._bias.ctypes.data,
            num_bias=self._bias.size,
        )
        self._prepare()

    def _prepare(self) -> None:
        self._choice = NativeChoice(
            vocab_size=self.vocab_size, num_prompt=self._prompt_ids.size, prompt=self._prompt_ids.ctypes.data
        )
        self._top = None
        if self._num_logprobs is not None:
            count = min(self._num_logprobs, self.vocab_size)
            self._top = (_Scored * max(1, count))()
            self._choice.num_top, self._choice.top = count, ctypes.addressof(self._top)

    def fork(self) -> NativeSampler:
        ahead = super().fork()
        assert isinstance(ahead, NativeSampler)
        ahead._ids = self._ids[:]
        ahead._prepare()
        return ahead

    def accept(self, token: int) -> None:
        self.answer.append(token)
        self._ids.append(token)

    def choose(self, logits_V: np.ndarray) -> Choice:
        row = np.ascontiguousarray(logits_V, np.float32)
        if row.shape != (self.vocab_size,):
            raise EngineError(f"logits of shape {row.shape}, expected {(self.vocab_size,)}")
        choice, mask = self._choice, self.mask_bits()
        choice.logits = row.ctypes.data
        choice.answer, choice.num_answer = self._ids.buffer_info()
        choice.mask = None if mask is None else mask.ctypes.data
        if self._lib.pp_sample(self._how, choice):
            message = self._lib.pp_last_error().decode(errors="replace")
            raise EngineError(message, hint=NOT_FINITE_HINT if "not finite" in message else None)
        if self._top is None:
            return Choice(choice.token)
        top = tuple((self._top[i].id, self._top[i].logprob) for i in range(choice.num_top))
        return Choice(choice.token, choice.logprob, top)
