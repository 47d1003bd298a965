"""The engine: a model file, its tokenizer and a backend, behind four calls.

    model = load("model.gguf")
    model.logits(ids)                                  # float32 [T, V]
    model.generate("Once upon a time", max_new_tokens=50).text
    for piece in model.chat([{"role": "user", "content": "Hi"}], stream=True): print(piece.text, end="")

Nothing happens silently: what was dropped, which rotation was used, why the answer ended and what came
from the cache is in the result; what cannot fit is refused before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np

from pocketphi import tokenizer as tokenization
from pocketphi.core import machine, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import EngineError, UserError, did_you_mean
from pocketphi.engine import session as context
from pocketphi.engine.backend import Backend, BackendOptions, CacheType, MemoryPlan
from pocketphi.engine.batch import Batch, finish_all
from pocketphi.engine.draft import Drafter, ModelDraft, check_draft
from pocketphi.engine.generation import Generation, Request, Stream
from pocketphi.engine.grammar import Grammar
from pocketphi.engine.lookup import Lookup
from pocketphi.engine.sampler import Sampler, Sampling, TokenMask, check_logits
from pocketphi.engine.session import ContextPolicy, Crossing, Message, Sequence
from pocketphi.engine.weights import Weights, open_weights
from pocketphi.model.config import ModelConfig
from pocketphi.tokenizer import Tokenizer

BackendName = Literal["auto", "native", "numpy"]
BACKENDS = {"native": "pocketphi.engine.native", "numpy": "pocketphi.engine.numpy_runtime"}

# A chat answer without a limit of its own is promised this much room before turns have to go.
_RESERVE_TOKENS = 512
_LEAST_CONTEXT = 256


@dataclass(frozen=True)
class Options:
    """Everything one answer can be asked for; the keywords of `Engine.generate` and `Engine.chat`.

    max_new_tokens: None goes on until a stop or until the context is full. When it is not given,
        `generate` takes 256 or what is left of the context, `chat` None.
    temperature ... seed: see `pocketphi.engine.sampler.Sampling`; the defaults are greedy.
    stop_ids: None takes the model's own (`Engine.stop_ids`).  stop: strings that end the answer.
    crossing: what happens when a sequence outgrows LongRoPE's short factors; see `session.Crossing`.
    context_policy: for `chat` only; see `session.fit`.
    logprobs: how many best tokens to report with log-probabilities; None reports nothing.
    lookup: most tokens proposed at a time by prompt lookup; None takes what the backend's steps make worth
        while, 0 is off. The text is the same either way.
    draft: a smaller Engine with the same tokenizer whose guesses are checked in one pass: same text, and
        sooner where it is often right. draft_tokens: most guesses at a time.
    grammar: what the answer must look like; see `grammar.Grammar`.
    token_mask: the hook for rules of your own; see `sampler.TokenMask`.
    """

    max_new_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_ids: Ids[int] | frozenset[int] | None = None
    stop: Ids[str] = ()
    crossing: Crossing = "exact"
    context_policy: ContextPolicy = "error"
    logprobs: int | None = None
    lookup: int | None = None
    draft: Engine | None = None
    draft_tokens: int = 4
    grammar: Grammar | None = None
    token_mask: TokenMask | None = None

    def __post_init__(self) -> None:
        if self.draft_tokens < 1:
            raise UserError(f"draft_tokens must be at least 1, found {self.draft_tokens}")
        if self.grammar is not None and self.token_mask is not None:
            raise UserError("grammar and token_mask: give one of them")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1 or None, found {self.max_new_tokens}")
        for name, known in (("crossing", Crossing), ("context_policy", ContextPolicy)):
            value, choices = getattr(self, name), known.__args__  # type: ignore[attr-defined]
            if value not in choices:
                raise UserError(f"unknown {name} '{value}'{did_you_mean(str(value), choices)}")
        self.sampling()

    def sampling(self) -> Sampling:
        """The part that concerns the choice of tokens."""
        names = (f.name for f in dataclasses.fields(Sampling))
        return Sampling(**{name: getattr(self, name) for name in names})


def _options(keywords: Mapping[str, Any]) -> Options:
    known = [f.name for f in dataclasses.fields(Options)]
    for name in keywords:
        if name not in known:
            raise UserError(f"unknown option '{name}'{did_you_mean(name, known)}")
    return Options(**keywords)


class Engine:
    """A loaded model. Made by `load`; used by one thread at a time.

    context_length: the most tokens that a sequence may have here, prompt and answer together.
    """

    def __init__(
        self,
        weights: Weights,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        context_length: int,
        stop_ids: frozenset[int],
    ) -> None:
        self._weights, self._backend, self._tokenizer = weights, backend, tokenizer
        self.config: ModelConfig = weights.config
        self.context_length = context_length
        self.stop_ids = stop_ids
        self.sequence = Sequence(backend)
        self._fingerprint: str | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; EngineError when the file came without one."""
        if self._tokenizer is None:
            raise EngineError(
                f"{self._weights.path}: no tokenizer comes with this model",
                hint="load(path, tokenizer=PATH) names one; generate() and logits() also take ids",
            )
        return self._tokenizer

    @property
    def backend(self) -> Backend:
        return self._backend

    @property
    def weights(self) -> Weights:
        return self._weights

    @property
    def fingerprint(self) -> str:
        """Tells this model (weights and shape) from others."""
        if self._fingerprint is None:
            self._fingerprint = self._weights.fingerprint()
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """Flat facts: the file, the shape, the backend and what it needs."""
        config = self.config
        chat = self._tokenizer.template.name if self._tokenizer and self._tokenizer.template else None
        return {
            "path": str(self._weights.path),
            "architecture": self._weights.architecture,
            "file_bytes": self._weights.file_bytes,
            "tensor_types": ", ".join(sorted(self._weights.types())),
            "num_parameters": config.num_parameters,
            "vocab_size": config.vocab_size,
            "num_layers": config.num_hidden_layers,
            "context_length": self.context_length,
            "model_context_length": config.max_position_embeddings,
            "chat_template": chat,
            **self._backend.describe(),
        }

    def logits(self, ids: Ids[int]) -> np.ndarray:
        """Return the logits after every token, float32 [T, V].

        The sequence is computed by itself, under the factor set of its own length. Raises EngineError
        when it is longer than the context, holds an unknown id, or gives NaN.
        """
        return np.concatenate(list(self.logits_in_pieces(ids, piece_tokens=max(1, len(ids)))))

    def logits_in_pieces(self, ids: Ids[int], piece_tokens: int = 128) -> Iterator[np.ndarray]:
        """Yield the rows of `logits(ids)` a piece at a time, so that long texts need little memory."""
        if not len(ids):
            raise EngineError("logits of an empty sequence")
        if len(ids) > self.context_length:
            raise EngineError(f"{len(ids)} tokens are more than the context of {self.context_length}")
        session = self._backend.new_session(len(ids), context.rope_set_for(self.config, len(ids)))
        try:
            for at in range(0, len(ids), piece_tokens):
                rows = self._backend.forward(session, ids[at : at + piece_tokens], "all")
                assert rows is not None
                yield check_logits(rows)
        finally:
            session.close()

    @overload
    def generate(
        self,
        prompt: str | Ids[int],
        *,
        stream: Literal[False] = False,
        sequence: Sequence | None = None,
        **options: Any,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: str | Ids[int],
        *,
        stream: Literal[True],
        sequence: Sequence | None = None,
        **options: Any,
    ) -> Stream: ...

    def generate(
        self,
        prompt: str | Ids[int],
        *,
        stream: bool = False,
        sequence: Sequence | None = None,
        **options: Any,
    ) -> Stream | Generation:
        """Continue a text or ids. Keywords are the fields of `Options`.

        Returns a Generation, or with `stream=True` a Stream to iterate. Raises EngineError when prompt
        and answer do not fit the context (with both numbers) or a logit is NaN, UserError for a value
        or keyword without a meaning. `sequence` chooses the cache to build on; the engine has one.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_bos=self.tokenizer.add_bos)
        else:
            ids = [int(i) for i in prompt]
        # The default limit is ours, so it gives way to a long prompt; a limit that was asked for does not.
        room = max(1, min(Options.max_new_tokens or 1, self.context_length - len(ids)))
        chosen = _options({"max_new_tokens": room, **options})
        reserve = chosen.max_new_tokens or 1
        if len(ids) + reserve > self.context_length:
            raise context.too_long(len(ids), reserve, self.context_length)
        # A text goes on where the prompt ends: the blank before its next word belongs to it.
        continuing = any(i not in self._special() for i in ids)
        return self._start(ids, chosen, [], continuing, stream, sequence)

    @overload
    def chat(
        self,
        messages: Ids[Message],
        *,
        stream: Literal[False] = False,
        sequence: Sequence | None = None,
        **options: Any,
    ) -> Generation: ...

    @overload
    def chat(
        self,
        messages: Ids[Message],
        *,
        stream: Literal[True],
        sequence: Sequence | None = None,
        **options: Any,
    ) -> Stream: ...

    def chat(
        self,
        messages: Ids[Message],
        *,
        stream: bool = False,
        sequence: Sequence | None = None,
        **options: Any,
    ) -> Stream | Generation:
        """Answer a conversation `[{"role": "user", "content": "Hi"}, ...]`; see `generate`.

        Room for the answer is reserved first: `max_new_tokens`, or when that is None a quarter of the
        context (at most 512 tokens), after which the answer may still go on while there is room.
        """
        chosen = _options({"max_new_tokens": None, **options})
        reserve = chosen.max_new_tokens or min(_RESERVE_TOKENS, max(1, self.context_length // 4))
        fitted = context.fit(
            messages,
            self.tokenizer.chat,
            context=self.context_length,
            reserve=reserve,
            policy=chosen.context_policy,
        )
        return self._start(fitted.ids, chosen, fitted.dropped, False, stream, sequence, reserve)

    def batch(self, max_sequences: int = 8, prefill_tokens: int = 128) -> Batch:
        """Several answers at once; see `pocketphi.engine.batch.Batch`."""
        return Batch(self, max_sequences, prefill_tokens)

    def generate_batch(
        self, prompts: Ids[str | Ids[int]], *, max_sequences: int = 8, **options: Any
    ) -> list[Generation]:
        """Continue several texts at once; each result is the one that `generate` gives."""
        with self.batch(max_sequences) as batch:
            return finish_all(batch, [batch.add(prompt, **options) for prompt in prompts])

    def new_sequence(self) -> Sequence:
        """A cache of its own for `generate(..., sequence=...)`; close it when done."""
        return Sequence(self._backend)

    def save_session(self, path: Path | str, notes: Mapping[str, Any] | None = None) -> int:
        """Write the cache of the engine's own sequence and `notes` to a file; returns its size in bytes."""
        return self.sequence.save(path, model=self.fingerprint, notes=notes)

    def load_session(self, path: Path | str) -> dict[str, Any]:
        """Read what `save_session` wrote; returns the notes (see `Sequence.load` for the errors)."""
        return self.sequence.load(path, model=self.fingerprint, limit=self.context_length)

    def close(self) -> None:
        """Free the weights and the caches."""
        self.sequence.close()
        self._backend.close()
        self._weights.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _special(self) -> frozenset[int]:
        return self._tokenizer.special_ids if self._tokenizer else frozenset()

    def _start(
        self,
        ids: list[int],
        options: Options,
        dropped: list[dict[str, Any]],
        continuing: bool,
        stream: bool,
        sequence: Sequence | None,
        reserve: int = 0,
    ) -> Stream | Generation:
        if not ids:
            raise EngineError("the prompt is empty: there is nothing to continue")
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise EngineError(f"token id {token} is outside the vocabulary of {self.config.vocab_size}")
        room = self.context_length - len(ids)
        limit = options.max_new_tokens
        decoder = None
        if self._tokenizer is not None:
            decoder = self._tokenizer.stream_decoder(continuing=continuing)
        elif options.stop:
            raise EngineError("stop strings need a tokenizer, and this model came without one")
        together = self._backend.tokens_per_reading
        # Beyond two readings of the weights even sure guesses gain little.
        max_draft = options.lookup if options.lookup is not None else max(0, 2 * together - 1)
        stop_ids = self.stop_ids if options.stop_ids is None else frozenset(options.stop_ids)
        drafter: Drafter | None = None
        if options.draft is not None:
            check_draft(self, options.draft)
            # Turns of one chat share the draft's cache too.
            cache = options.draft.sequence if sequence is None else options.draft.new_sequence()
            drafter = ModelDraft(options.draft, cache, ids, options.draft_tokens)
        elif max_draft:
            drafter = Lookup(ids, max_draft, together or 6)
        token_mask = options.token_mask
        if options.grammar is not None:
            token_mask = options.grammar.mask(self.tokenizer, self.config.vocab_size, stop_ids)
        request = Request(
            ids=ids,
            max_new_tokens=room if limit is None else limit,
            length_reason="context" if limit is None else "length",
            rope_set=context.rope_set_for(self.config, len(ids) + (limit or reserve)),
            crossing=options.crossing,
            context=self.context_length,
            stop_ids=stop_ids,
            stop_strings=tuple(options.stop),
            keep_logprobs=options.logprobs is not None,
            dropped=dropped,
        )
        plain = Sampler(
            options.sampling(),
            ids,
            self.config.vocab_size,
            token_mask=token_mask,
            num_logprobs=options.logprobs,
        )
        sampler = self._backend.sampler(plain)
        made = Stream(request, sequence or self.sequence, sampler, decoder, self.config, drafter)
        return made if stream else made.finish()


def load(
    path: Artifact | Path | str | Weights,
    *,
    num_threads: int | None = None,
    backend: BackendName = "auto",
    context_length: int | None = None,
    cache_type: CacheType | None = None,
    tokenizer: Tokenizer | Path | str | None = None,
) -> Engine:
    """Load a GGUF file, a Hugging Face folder, an artifact holding either, or weights opened before.

    `backend="auto"` takes the native core, and NumPy (saying so) where that is not available.
    `context_length` is the model's own unless given; without it, a context too big for this machine's
    memory is made smaller, which is said. Raises EngineError when weights and cache do not fit into
    memory (before anything is loaded), for unknown architectures, tensor types and backends, and for a
    vocabulary that does not match; CheckpointError and DataError for damaged files.
    """
    if num_threads is not None and num_threads < 1:
        raise UserError(f"num_threads must be at least 1, found {num_threads}")
    if isinstance(path, Weights):
        weights = path
    else:
        weights = open_weights(path.path if isinstance(path, Artifact) else path)
    try:
        module = _backend_module(backend)
        options = BackendOptions(num_threads=num_threads, cache_type=cache_type)
        plan = getattr(module, "plan", stored_plan)
        length = _fit_memory(weights, plan(weights, options), context_length)
        vocabulary = _load_tokenizer(weights, tokenizer)
        ends = _stop_ids(weights, vocabulary)
        loaded = module.load(weights, options)
    except BaseException:
        weights.close()
        raise
    return Engine(weights, loaded, vocabulary, context_length=length, stop_ids=ends)


def _backend_module(name: str) -> ModuleType:
    if name not in ("auto", *BACKENDS):
        raise EngineError(f"unknown backend '{name}'{did_you_mean(name, ('auto', *BACKENDS))}")
    if name == "numpy":
        return importlib.import_module(BACKENDS[name])
    try:
        module = importlib.import_module(BACKENDS["native"])
        reason = module.available()
    except ImportError as error:
        reason = f"it is not built ({error})"
    if not reason:
        return module
    if name == "native":
        raise EngineError(f"the native core cannot be used: {reason}", hint="backend='numpy' always works")
    _say_once(f"the native core cannot be used: {reason}; computing with NumPy, which is much slower")
    return importlib.import_module(BACKENDS["numpy"])


def describe_backend() -> str:
    """Name in a few words what a model loaded here would be computed with."""
    try:
        module = importlib.import_module(BACKENDS["native"])
        reason = module.available()
    except ImportError:
        module, reason = None, "not built"
    if module is None or reason:
        return f"NumPy (native core: {reason})"
    kernels = getattr(module, "kernels", None)
    return f"native, {kernels()}" if kernels else "native"


_SAID: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _SAID:
        _SAID.add(message)
        progress.say(message)


def stored_plan(weights: Weights, options: BackendOptions) -> MemoryPlan:
    """What a backend needs that keeps the weights in the formats of the file and a 16-bit cache."""
    config = weights.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = values * {"f32": 4.0, "q8_0": 34 / 32}.get(options.cache_type or "f16", 2.0)
    widest = 6 * config.hidden_size + 4 * config.intermediate_size
    working = options.max_batch_tokens * 4 * widest + 4 * config.vocab_size
    return MemoryPlan(sum(weights.types().values()), int(cache), working)


def _fit_memory(weights: Weights, plan: MemoryPlan, wanted: int | None) -> int:
    """Return the context length to use; EngineError with the numbers when memory does not do."""
    own = weights.config.max_position_embeddings
    if wanted is not None and not 1 <= wanted <= own:
        raise EngineError(
            f"a context of {wanted} tokens was asked for, {weights.path.name} was trained for 1 to {own}"
        )
    available = machine.memory_available_bytes()
    least = min(own, _LEAST_CONTEXT) if wanted is None else wanted
    if plan.total(least) > available:
        raise EngineError(
            f"{weights.path.name} needs {_gib(plan.total(least))} of memory (weights "
            f"{_gib(plan.weight_bytes)}, cache of {least} tokens "
            f"{_gib(plan.cache_bytes_per_token * least)}, working memory {_gib(plan.working_bytes)}); "
            f"{_gib(available)} are available",
            hint="close other programs, take a file with fewer bits, or ask for less context",
        )
    if wanted is not None:
        return wanted
    if plan.total(own) <= available:
        return own
    fits = (available - plan.weight_bytes - plan.working_bytes) // plan.cache_bytes_per_token
    length = max(least, int(fits) // 256 * 256)
    _say_once(
        f"the context is {length} tokens, not the model's {own}: a cache of that size needs "
        f"{_gib(plan.cache_bytes_per_token * own)}, {_gib(available)} of memory are available in all"
    )
    return length


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _load_tokenizer(weights: Weights, given: Tokenizer | Path | str | None) -> Tokenizer | None:
    if isinstance(given, Tokenizer):
        found: Tokenizer | None = given
    elif given is not None:
        found = tokenization.load(given)
    elif weights.gguf is not None:
        has = "tokenizer.ggml.tokens" in weights.gguf.metadata
        found = tokenization.load(weights.gguf) if has else None
    elif weights.path.is_dir() and any(
        (weights.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    ):
        found = tokenization.load(weights.path)
    else:
        found = None
    if found is not None and found.vocab_size > weights.config.vocab_size:
        raise EngineError(
            f"vocabulary mismatch: the tokenizer has {found.vocab_size} ids, the model "
            f"{weights.config.vocab_size}",
            hint="take the tokenizer that came with this model",
        )
    return found


def _stop_ids(weights: Weights, vocabulary: Tokenizer | None) -> frozenset[int]:
    """Every id that ends an answer: the template's, the configuration's and generation_config.json's.

    One list from three places, because published Phi-3 files each name only some of the three.
    """
    found = set(vocabulary.stop_ids) if vocabulary is not None else set()
    sources: list[Any] = [weights.config.eos_token_id]
    generation = weights.path / "generation_config.json"
    if weights.path.is_dir() and generation.is_file():
        try:
            sources.append(json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id"))
        except (OSError, ValueError, AttributeError) as error:
            raise EngineError(f"{generation}: not readable: {error}") from None
    for source in sources:
        for token in source if isinstance(source, list) else [source]:
            if isinstance(token, int) and 0 <= token < weights.config.vocab_size:
                found.add(token)
    return frozenset(found)
