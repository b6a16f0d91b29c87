import pytest
import torch
from common import evaluation
from common.data import Encoder, Example
from common.models import load_model


def test_wilson_intervals():
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20
    for correct, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert evaluation.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluation.wilson(20, 20)[1] == 1.0


def test_the_paired_difference_is_that_of_the_differences():
    a = torch.tensor([True, True, False, False])
    b = torch.tensor([True, True, True, False])
    mean, half = evaluation.paired_difference(a, b)
    assert mean == 0.25 and half == pytest.approx(evaluation.Z95 * 0.5 / 2)
    assert evaluation.paired_difference(a, a) == (0.0, 0.0)


def test_answers_do_not_depend_on_the_batches(tiny_model, tokenizer):
    encode = Encoder(tokenizer, "Review: {text}\nSentiment:", ("negative", "positive"))
    model = load_model(str(tiny_model), torch.float32, torch.device("cpu"))
    examples = [Example("good " * k, k % 2) for k in (5, 1, 3, 2, 8)]
    alone = torch.cat([evaluation.label_logits(model, encode, [one], torch.device("cpu")) for one in examples])
    together = evaluation.label_logits(model, encode, examples, torch.device("cpu"), batch_size=3)
    torch.testing.assert_close(alone, together)
    assert (
        evaluation.is_correct(alone, examples).tolist() == (alone.argmax(-1) == torch.tensor([1, 1, 1, 0, 0])).tolist()
    )
