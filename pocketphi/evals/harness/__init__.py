"""Any task of lm-evaluation-harness, by its own definition: `lm-eval/NAME`, `lm-eval/NAME:shots=5`.

lm-eval decides what is asked and how an answer counts: YAML, prompts, delimiters, the draw of the shots,
filters, `process_results`, aggregation, versions. Everything else is PocketPhi's: the model's back ends,
prefixes computed once, the journal, records, standard errors, hashes, comparisons. A group is one entry
whose parts are its tasks, with lm-eval's weights; a tag, or a group without a score of its own, is its tasks.

`index` finds definitions, `rows` supplies the data, `build` makes the items, `scoring` asks and counts.
The package `lm_eval` is imported when such a task is named, never before.
"""

from pocketphi.evals.harness.build import load as load
from pocketphi.evals.harness.index import PREFIX as PREFIX
from pocketphi.evals.harness.index import parse as parse
from pocketphi.evals.harness.scoring import about as about
from pocketphi.evals.harness.scoring import figures as figures
from pocketphi.evals.harness.scoring import new_tokens as new_tokens
from pocketphi.evals.harness.scoring import run_task as run_task
from pocketphi.evals.harness.scoring import version as version
