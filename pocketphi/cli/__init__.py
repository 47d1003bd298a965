"""The `phi` command: one small file per verb, imported only when that verb is called.

Exit codes: 0 done, 1 failed, 2 wrong usage. Messages go to stderr, data to stdout.
"""

from __future__ import annotations

import importlib
import os
import sys

import click
import typer

from pocketphi import __version__
from pocketphi.core.errors import PocketPhiError, did_you_mean

# Verb -> (module under pocketphi.cli, one line of help). The order is the order of `phi --help`:
# what one does with a model first, then the life of a model.
VERBS: dict[str, tuple[str, str]] = {
    "chat": ("chat", "Talk to a model, or answer one prompt."),
    "bench": ("bench", "Measure speed and memory of a model on this machine."),
    "models": ("models", "List the models on this machine."),
    "pull": ("pull", "Download a model from the Hub."),
    "doctor": ("doctor", "Show what this machine has and what it can run."),
    "recipe": ("recipe", "Run, plan or show a whole recipe, from pages to chat."),
    "corpus": ("corpus", "Filter, score and explain documents."),
    "synth": ("synth", "Make definitions, questions and arithmetic from seeds."),
    "tokenizer": ("tokenizer", "Train a tokenizer; encode text; write token shards."),
    "train": ("train", "Pre-train a model in phases."),
    "sft": ("sft", "Fine-tune a model on chat data."),
    "quantize": ("quantize", "Write a 4-bit or 8-bit GGUF file."),
    "perplexity": ("perplexity", "Measure how well a model predicts a text."),
    "eval": ("eval", "Score a model on benchmarks, with standard errors."),
    "report": ("report", "Draw the offline HTML page of a run."),
}


class LazyVerbs(click.Group):
    """A group that imports a verb's module on first use, so that `phi chat` never waits for torch."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = importlib.import_module(f"pocketphi.cli.{VERBS[name][0]}")
        command = typer.main.get_command(module.app)
        command.name = name
        return command

    def resolve_command(self, context: click.Context, arguments: list[str]):  # type: ignore[no-untyped-def]
        name = arguments[0] if arguments else ""
        if name and name not in VERBS and not name.startswith("-"):
            context.fail(f"no such verb '{name}'{did_you_mean(name, VERBS)}")
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(
    cls=LazyVerbs,
    help="Make small capable language models, and run them on this device.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="phi")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def phi(debug: bool) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `phi` command; exits the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    # `--debug` works wherever it stands, not only before the verb.
    rest = [a for a in arguments if a != "--debug"]
    try:
        result = phi.main(rest, prog_name="phi", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except PocketPhiError as error:
        if debug:
            raise
        _complain(error.message, error.hint)
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help(), file=sys.stderr)
        code = 2
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.exceptions.Exit, click.exceptions.Abort) as error:
        code = getattr(error, "exit_code", 130)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("pocketphi"):
            raise
        _complain(
            f"this verb needs the package '{error.name}', which is not installed",
            "pip install 'pocketphi[make]' installs everything that makes models",
        )
        code = 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader (head, less) went away: not our error, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _complain(message: str, hint: str | None) -> None:
    print(f"phi: {message}", file=sys.stderr)
    if hint:
        print(f"\n  hint: {hint}", file=sys.stderr)
