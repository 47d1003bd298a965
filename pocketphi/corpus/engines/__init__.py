"""Engines: who computes the parts. The output does not depend on the engine or the number of workers."""
