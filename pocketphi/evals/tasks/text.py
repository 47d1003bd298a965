"""Bits per byte of the shards' held-out documents and of local text files."""

from pocketphi.evals.task import Task, register

register(
    Task(
        "bits",
        "bits",
        1,
        "Bits per byte",
        None,
        (),
        "the shards' held-out documents, or config.texts",
        metric="bits_per_byte",
    )
)
