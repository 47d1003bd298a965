"""PocketPhi: make small capable language models, and run them on the device in your hand."""

__version__ = "0.1.0"
