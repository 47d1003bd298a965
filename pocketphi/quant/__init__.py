"""Quantisation: a checkpoint becomes a GGUF file of 4, 6 or 8 bits, and how faithful it is, is measured.

Round-to-nearest needs no torch; calibrated methods run the model on text and import it.
"""

from pocketphi.quant.config import SCHEMES, QuantConfig
from pocketphi.quant.stage import plan, run

__all__ = ["SCHEMES", "QuantConfig", "plan", "run"]
