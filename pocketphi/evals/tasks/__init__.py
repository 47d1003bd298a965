"""The tasks. Importing this package fills `pocketphi.evals.task.TASKS`."""

from pocketphi.evals.tasks import choice as choice
from pocketphi.evals.tasks import dialogue as dialogue
from pocketphi.evals.tasks import generate as generate
from pocketphi.evals.tasks import haystack as haystack
from pocketphi.evals.tasks import text as text
