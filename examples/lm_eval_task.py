"""EleutherAI's lm-eval on a compressed model, with a task of one's own.

python examples/lm_eval_task.py [MODEL]     (extra `eval`)

From the command line: ``lorc lm-eval run --model lorc --model_args pretrained=MODEL,ratio=0.25 --tasks boolq``.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from lorc_fx.lm_eval_adapter import evaluate
from lorc_fx.models import load_model

QUESTIONS = [("is water wet", 0), ("is a stone soft", 1), ("do rivers bend", 0)]
TASK = """
task: rivers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rivers.json}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.unk_token  # lm-eval needs one
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"question": question, "label": label} for question, label in QUESTIONS]
        Path(folder, "rivers.json").write_text(json.dumps(rows))
        Path(folder, "rivers.yaml").write_text(TASK.format(folder=folder))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        found = evaluate(model, ["rivers"], options, tokenizer=tokenizer, task_manager=tasks, bootstrap_iters=0)
    print(found["results"]["rivers"])
    return {"model": model, "accuracy": found["results"]["rivers"]["acc,none"], "samples": found["samples"]["rivers"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
