"""A run of a language model that was interrupted goes on from its checkpoint."""

import json

import mathematics
import pytest
from helpers import byte_llama
from safetensors.torch import load_file


def arguments(folder, data, *more):
    made = byte_llama.arguments(folder, "--dataset", data, "--method", "flat", "--save_steps", 1, *more)
    return [*made, "--max_new_tokens", "2"]


@pytest.mark.slow
def test_an_interrupted_run_gives_the_adapter_of_one_that_was_not(tmp_path, monkeypatch):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"question": f"{k}?", "answer": str(k)}) + "\n" for k in range(20)))
    steps, fit = [], mathematics.fit

    def watched(model, method, args, folder, seed, train, collate):
        def batch(rows):
            steps.append(folder.parent.parent.name)
            if steps.count("two") == 3 and "resumed" not in steps:
                raise KeyboardInterrupt
            return collate(rows)

        return fit(model, method, args, folder, seed, train, batch)

    monkeypatch.setattr(mathematics, "fit", watched)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    mathematics.main(arguments(tmp_path / "one", data))
    with pytest.raises(KeyboardInterrupt):
        mathematics.main(arguments(tmp_path / "two", data))
    seen = len(steps)
    steps.append("resumed")
    mathematics.main(arguments(tmp_path / "two", data))
    assert len(steps) - seen - 1 < steps.count("one")  # not all batches again
    one, two = (
        load_file(tmp_path / name / "out/flat-seed0/adapter/adapter_model.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].equal(two[name]), name
