"""The chat in a terminal: streaming, commands, several lines, history, and Ctrl-C that only stops the answer.

Answers go to stdout, everything else to stderr. Colour appears on a terminal only (and never with
NO_COLOR). The conversation is a plain list of messages; an answer that was stopped stays in it.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from pocketphi.core.errors import PocketPhiError, did_you_mean
from pocketphi.engine.catalog import models_folder
from pocketphi.engine.engine import Engine
from pocketphi.engine.generation import Generation, Stream
from pocketphi.engine.measure import peak_rss_bytes

COMMANDS = {
    "/help": "show this list",
    "/system": "/system TEXT sets the system message, /system alone shows it, /system - removes it",
    "/save": "/save FILE keeps the conversation and its cache in a file",
    "/load": "/load FILE goes on with a saved conversation",
    "/stats": "show speed, memory and context of the last answer",
    "/reset": "begin a new conversation",
    "/exit": "leave (also Ctrl-D)",
}
_QUOTES = '"""'
STDIN_WAIT_S = 3.0


def notes_of(result: Generation, *, context: int) -> list[str]:
    """What a person must know about an answer besides its text; empty when all went as usual."""
    notes = []
    if result.dropped_turns:
        tokens = sum(int(t["num_tokens"]) for t in result.dropped_turns)
        notes.append(
            f"{len(result.dropped_turns)} oldest messages ({tokens} tokens) were left out to fit the "
            f"context of {context}"
        )
    if result.rope_crossing == "exact":
        notes.append("the conversation outgrew the short rotary factors: recomputed under the long ones")
    elif result.rope_crossing == "fast":
        notes.append("the conversation outgrew the short rotary factors: cached keys turned (approximate)")
    if result.finish_reason == "length":
        notes.append(f"stopped after {len(result.tokens)} tokens, the limit for an answer (--max-tokens)")
    elif result.finish_reason == "context":
        notes.append(f"stopped because the context of {context} tokens is full")
    elif result.finish_reason == "rope_limit":
        notes.append("stopped where the short rotary factors end (--crossing exact goes on)")
    return notes


def summary(result: Generation, engine: Engine) -> str:
    """One line of figures: tokens, speeds, memory, kernels."""
    facts = engine.describe()
    computed = result.prompt_tokens - result.cached_tokens
    return (
        f"{len(result.tokens)} tokens, {result.decode_tokens_per_s:.1f} tokens/s; prompt {computed} tokens"
        f"{f' (+{result.cached_tokens} cached)' if result.cached_tokens else ''}, "
        f"{result.prefill_tokens_per_s:.1f} tokens/s; first token after {result.time_to_first_token_s:.2f} s; "
        f"memory {peak_rss_bytes() / 2**20:.0f} MiB; {facts['backend']} ({facts['kernels']})"
    )


def read_piped(stream: TextIO | None = None, wait_s: float | None = STDIN_WAIT_S) -> str:
    """Return the text piped into this process, "" when there is none.

    A terminal is never read. An open pipe that stays silent for `wait_s` seconds is given up, which is
    said: many programs start others with a pipe that they never write to or close.
    """
    stream = sys.stdin if stream is None else stream
    try:
        descriptor = stream.fileno()
        kind = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):
        return ""
    if os.isatty(descriptor):
        return ""
    if wait_s is not None and not stat.S_ISREG(kind) and hasattr(select, "poll"):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        if not poll.poll(wait_s * 1000):
            print(
                f"nothing came on the piped stdin for {wait_s:g} s: answering without it "
                "(--stdin waits for it)",
                file=sys.stderr,
            )
            return ""
    return stream.read()


@contextmanager
def stops_on_interrupt(stream: Stream) -> Iterator[None]:
    """Inside the block Ctrl-C ends the answer after the token in work; pressed twice it interrupts."""

    def handle(_signal: int, _frame: Any) -> None:
        if stream.stopped:
            raise KeyboardInterrupt
        stream.stop()

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Console:
    """A conversation at a terminal. `read_line(prompt)` returns a line or raises EOFError."""

    def __init__(
        self,
        engine: Engine,
        options: dict[str, Any],
        *,
        system: str | None = None,
        read_line: Callable[[str], str] | None = None,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self.engine, self.options = engine, options
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self._read = read_line or input
        self._colour = (
            self.out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        )
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.last: Generation | None = None

    def run(self) -> None:
        """Read, answer, repeat; returns when the person leaves."""
        facts = self.engine.describe()
        self._say(
            f"{Path(facts['path']).name}: {facts['num_parameters'] / 1e6:.0f}M parameters, context "
            f"{facts['context_length']}, {facts['backend']} ({facts['kernels']}). /help lists the commands, "
            f"{_QUOTES} begins and ends several lines, Ctrl-C stops an answer, Ctrl-D leaves."
        )
        with _history():
            while True:
                try:
                    text = self._read_message()
                except EOFError:
                    self._say("")
                    return
                except KeyboardInterrupt:
                    self._say("\n(Ctrl-D or /exit leaves)")
                    continue
                if not text.strip():
                    continue
                try:
                    if text.startswith("/") and not text.startswith("//"):
                        if self._command(text.strip()):
                            return
                    else:
                        self._answer(text[1:] if text.startswith("//") else text)
                except PocketPhiError as error:
                    self._say(f"phi: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""))
                except KeyboardInterrupt:
                    self._say("\n(interrupted)")

    def _read_message(self) -> str:
        line = self._read(self._paint("> ", "1;32"))
        if line.strip().startswith(_QUOTES):
            rest = line.strip()[len(_QUOTES) :]
            lines = [rest] if rest else []
            while True:
                if lines and lines[-1].rstrip().endswith(_QUOTES):
                    lines[-1] = lines[-1].rstrip()[: -len(_QUOTES)]
                    return "\n".join(lines).strip("\n")
                lines.append(self._read(self._paint("… ", "2")))
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._read(self._paint("… ", "2"))
        return line

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        stream = self.engine.chat(messages, stream=True, **self.options)
        # The question stays only if it could be asked: an error above leaves the conversation as it was.
        with stops_on_interrupt(stream):
            for chunk in stream:
                print(chunk.text, end="", file=self.out, flush=True)
        print(file=self.out, flush=True)
        result = self.last = stream.result
        for note in notes_of(result, context=self.engine.context_length):
            self._say(f"({note})")
        if result.finish_reason == "interrupted":
            self._say("(stopped)")
        self.messages = [*messages, {"role": "assistant", "content": result.text}]

    def _command(self, line: str) -> bool:
        """Carry out a command; returns whether to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return True
        if name == "/help":
            self._say("\n".join(f"{c:<9}{text}" for c, text in COMMANDS.items()))
        elif name == "/system":
            self._system(rest)
        elif name in ("/reset", "/clear"):
            self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
            self._say("(a new conversation)")
        elif name == "/stats":
            self._stats()
        elif name in ("/save", "/load") and not rest:
            self._say(f"{name} needs a file name")
        elif name == "/save":
            size = self.engine.save_session(rest, {"messages": self.messages})
            self._say(f"({len(self.messages)} messages saved to {rest}, {size} bytes)")
        elif name == "/load":
            notes = self.engine.load_session(rest)
            found = notes.get("messages")
            if not isinstance(found, list):
                self._say(f"{rest} holds a cache but no conversation")
            else:
                self.messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in found]
                self._say(f"({len(self.messages)} messages; cache {notes['cache']})")
        else:
            self._say(f"no such command {name}{did_you_mean(name, COMMANDS)}; // begins a text with a slash")
        return False

    def _system(self, text: str) -> None:
        rest = [m for m in self.messages if m["role"] != "system"]
        if not text:
            have = [m["content"] for m in self.messages if m["role"] == "system"]
            self._say(have[0] if have else "(no system message)")
        elif text == "-":
            self.messages = rest
            self._say("(no system message)")
        else:
            self.messages = [{"role": "system", "content": text}, *rest]
            self._say("(system message set)")

    def _stats(self) -> None:
        if self.last is None:
            self._say("(no answer yet)")
            return
        used = len(self.engine.sequence.ids)
        self._say(summary(self.last, self.engine))
        self._say(
            f"context {used} of {self.engine.context_length} tokens; rotation {self.last.rope_set}"
            f"{' (approximate)' if self.last.approximate else ''}; seed {self.last.seed}; "
            f"drafts accepted {self.last.accepted_tokens} of {self.last.drafted_tokens}"
        )

    def _say(self, message: str) -> None:
        print(self._paint(message, "2") if message.startswith("(") else message, file=self.err, flush=True)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


@contextmanager
def _history() -> Iterator[None]:
    """Line editing with a history that outlives the process; nothing where readline is missing."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = models_folder().parent / "history"
    if not sys.stdin.isatty():
        yield
        return
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def answer_once(
    engine: Engine,
    prompt: str,
    options: dict[str, Any],
    *,
    system: str | None = None,
    out: TextIO | None = None,
) -> Generation:
    """Answer one prompt, streaming to `out` (nothing when None); returns the finished Generation."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    stream = engine.chat(messages, stream=True, **options)
    with stops_on_interrupt(stream):
        for chunk in stream:
            if out is not None:
                print(chunk.text, end="", file=out, flush=True)
    if out is not None:
        print(file=out, flush=True)
    return stream.result
