"""The engine: load a model file and talk to it on a CPU, without torch.

from pocketphi import engine
model = engine.load("model.gguf")
print(model.chat([{"role": "user", "content": "What is a plant?"}], stream=False).text)
"""
