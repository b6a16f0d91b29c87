"""Answer questions with saved adapters and merged models, in a process that cannot import flatlora.

    python examples/common/reload_adapter.py JOB.json

The job names the base model, the folders with the adapters and merged models, the questions and the file for the
answers. `language_model.py` runs this to show that what was saved are ordinary LoRA adapters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.modules["flatlora"] = None  # type: ignore[assignment]  # importing it is an error from here on

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402

from common.data import Encoder, Example  # noqa: E402
from common.evaluation import label_logits  # noqa: E402
from common.models import load_model, load_tokenizer  # noqa: E402


def main(job_file: str) -> None:
    """Read the job; write the logits of each adapter and of each merged model, (examples, labels)."""
    transformers.utils.logging.disable_progress_bar()
    with open(job_file) as file:
        job = json.load(file)
    dtype, device = getattr(torch, job["dtype"]), torch.device(job["device"])
    encode = Encoder(load_tokenizer(job["base"]), job["prompt"], job["labels"], job["max_tokens"])
    examples = [Example(text, label) for text, label in job["examples"]]

    answers = {}
    for method, folder in job["folders"].items():
        adapted = PeftModel.from_pretrained(load_model(job["base"], dtype, device), f"{folder}/adapter")
        merged = load_model(f"{folder}/merged", dtype, device)
        answers[method] = {
            name: label_logits(model, encode, examples, device, job["batch_size"]).tolist()
            for name, model in (("adapter", adapted), ("merged", merged))
        }
    with open(job["answers"], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(sys.argv[1])
