"""A recipe: one YAML file that runs the whole chain, from pages to chat.

`run` executes the stages that the file names, in the order of a model's life, skipping what is
already there; `plan` forecasts memory, time and disk before anything starts.
"""

from pocketphi.recipe.plan import Forecast, plan
from pocketphi.recipe.runner import RunResult, run
from pocketphi.recipe.stages import STAGES, Recipe, read

__all__ = ["STAGES", "Forecast", "Recipe", "RunResult", "plan", "read", "run"]
