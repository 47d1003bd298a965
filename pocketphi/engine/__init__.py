"""The engine: load a model file and talk to it on a CPU, without torch.

from pocketphi import engine
model = engine.load("model.gguf")
print(model.chat([{"role": "user", "content": "What is a plant?"}]).text)
"""

from pocketphi.engine.batch import Batch
from pocketphi.engine.catalog import embedded_path, find_models, resolve
from pocketphi.engine.engine import Engine, Options, describe_backend, load
from pocketphi.engine.generation import Chunk, Generation, Stream
from pocketphi.engine.grammar import Grammar
from pocketphi.engine.session import Sequence

__all__ = [
    "Batch",
    "Chunk",
    "Engine",
    "Generation",
    "Grammar",
    "Options",
    "Sequence",
    "Stream",
    "describe_backend",
    "embedded_path",
    "find_models",
    "load",
    "resolve",
]
