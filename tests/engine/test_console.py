"""The terminal chat: commands, several lines, Ctrl-C, colour, and text piped in."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocketphi import engine
from pocketphi.engine.console import Console, read_piped


def _console(
    model: engine.Engine, lines: list[str], **options: object
) -> tuple[Console, io.StringIO, io.StringIO]:
    feed: Iterator[str] = iter(lines)

    def read(_prompt: str) -> str:
        try:
            return next(feed)
        except StopIteration:
            raise EOFError from None

    out, err = io.StringIO(), io.StringIO()
    chosen = {"max_new_tokens": 6, **options}
    return Console(model, chosen, read_line=read, out=out, err=err), out, err


def test_a_conversation_with_commands(chat_model: engine.Engine, tmp_path: Path) -> None:
    file = tmp_path / "talk"
    console, out, err = _console(
        chat_model,
        ["/system be brief", "hello", "how are\\", "you", '"""', "two", "lines", '"""', "//slash", f"/save {file}",
         "/reset", f"/load {file}", "again", "/stats", "/help", "/syste", "/exit", "never read"],
    )  # fmt: skip
    console.run()
    said = [m["content"] for m in console.messages if m["role"] != "assistant"]
    assert said == ["be brief", "hello", "how are\nyou", "two\nlines", "/slash", "again"]
    assert [m["role"] for m in console.messages[1:]] == ["user", "assistant"] * 5
    text = err.getvalue()
    assert (
        "cache restored" in text
        and "tokens/s" in text
        and "no such command /syste (did you mean '/system'?)" in text
    )
    assert "stopped after 6 tokens" in text, "a cut answer says so"
    answers = [m["content"] for m in console.messages if m["role"] == "assistant"]
    assert out.getvalue() == "".join(a + "\n" for a in answers)
    assert "\x1b[" not in out.getvalue() + text.replace("\x1b", "", 0)


def test_an_error_leaves_the_conversation_as_it_was(chat_model: engine.Engine) -> None:
    console, _, err = _console(chat_model, ["hi", "word " * 300, "/load /does/not/exist", "and you?"])
    console.run()
    assert [m["content"] for m in console.messages if m["role"] == "user"] == ["hi", "and you?"]
    assert "reserved for the answer" in err.getvalue() and "cannot be read" in err.getvalue()


def test_dropped_turns_are_told(chat_model: engine.Engine) -> None:
    console, _, err = _console(
        chat_model, ["some words to fill the context " * 2] * 6, context_policy="drop-oldest"
    )
    console.run()
    assert "oldest messages" in err.getvalue() and "left out to fit the context of 256" in err.getvalue()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat_model: engine.Engine) -> None:
    # A shell without job control starts what it puts into the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _stop_and_go_on(chat_model)
    finally:
        signal.signal(signal.SIGINT, before)


def _stop_and_go_on(chat_model: engine.Engine) -> None:
    console, _, err = _console(chat_model, ["hi", "more"], max_new_tokens=100, stop_ids=[])
    original, calls = chat_model.backend.forward, []

    def forward(*arguments: object, **keywords: object) -> object:
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    chat_model.backend.forward = forward  # type: ignore[method-assign, assignment]
    console.run()
    assert "(stopped)" in err.getvalue()
    roles = [m["role"] for m in console.messages]
    assert roles == ["user", "assistant"] * 2, "the stopped answer stays, and the chat went on"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("content", ["text\nmore", ""])
def test_piped_files_are_read(content: str, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text(content)
    with open(path) as stream:
        assert read_piped(stream) == content


def test_a_silent_pipe_does_not_hang(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader) as stream:
        started = time.monotonic()
        assert read_piped(stream, wait_s=0.2) == ""
        assert time.monotonic() - started < 5
        assert "nothing came on the piped stdin" in capsys.readouterr().err
        os.write(writer, b"late")
        os.close(writer)
        assert read_piped(stream, wait_s=0.2) == "late"


def test_a_terminal_chat_from_start_to_end(chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A real pseudo-terminal: colour, an answer, Ctrl-C at the prompt, Ctrl-D."""
    command = [sys.executable, "-c", "from pocketphi.cli import main; main()", "chat", "--backend", "numpy"]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "POCKETPHI_HOME": str(tmp_path)}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [*command, "--model", str(chat_folder()), "--max-tokens", "5"],
        stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def until(text: str, press: bytes = b"") -> None:
        """Read until the text is there; press the key once a second (Python's line editor may miss a
        signal that comes between its prompt and its wait)."""
        nonlocal seen
        deadline = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if press:
                os.write(master, press)
            while select.select([master], [], [], 1.0)[0] and text not in seen:
                seen += os.read(master, 4096).decode(errors="replace")

    until("> ")
    seen = ""
    os.write(master, b"hello\n")
    until("> ")
    assert "\x1b[" in seen
    until("Ctrl-D or /exit leaves", press=b"\x03")
    os.write(master, b"\x04")
    assert process.wait(60) == 0
    os.close(master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
