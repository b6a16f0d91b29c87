"""TRL's other trainers with `peft_config=`, and options that change the passes."""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
from helpers import tiny
from helpers.trl_runs import GENERATES, LENGTH, STEPS, assert_clean_but_for_training, number_of_words, texts, train

from flatlora import TwoPassTrainerMixin

pytest.importorskip("trl")
from trl import GRPOTrainer, KTOConfig, KTOTrainer, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

PAIRS = ("prompt", "chosen", "rejected")
kto_was_experimental = pytest.mark.filterwarnings("ignore:The `KTO.* is now located in `trl.experimental:FutureWarning")


@kto_was_experimental
def test_kto(passes, tmp_path):
    data = texts("prompt", "completion").add_column("label", [True, False] * 4)
    run, seen = train(KTOTrainer, KTOConfig, tiny.base_model(), data, tmp_path, passes, loss_type="apo_zero_unpaired")
    assert_clean_but_for_training(run, seen, training=STEPS, other=STEPS)


@kto_was_experimental
def test_kto_with_a_pass_for_the_divergence(passes, tmp_path):
    data = texts("prompt", "completion").add_column("label", [True, False] * 4)
    run, seen = train(KTOTrainer, KTOConfig, tiny.base_model(), data, tmp_path, passes)
    divergence, reference = STEPS, 2 * STEPS
    assert_clean_but_for_training(run, seen, training=STEPS, other=divergence + reference)


def test_rloo(passes, tmp_path):
    data, more, settings = texts("prompt"), {"reward_funcs": number_of_words}, {**GENERATES, "num_iterations": 1}
    run, seen = train(RLOOTrainer, RLOOConfig, tiny.base_model(), data, tmp_path, passes, more=more, **settings)
    old, reference = 1, 1
    assert_clean_but_for_training(run, seen, training=STEPS, other=STEPS * (LENGTH + old + reference))


WITHOUT_REFERENCE = {
    "orpo": (ORPOTrainer, ORPOConfig, PAIRS),
    "cpo": (CPOTrainer, CPOConfig, PAIRS),
    "tpo": (TPOTrainer, TPOConfig, (*PAIRS, "reference")),
}


@pytest.mark.parametrize("kind, arguments, columns", WITHOUT_REFERENCE.values(), ids=WITHOUT_REFERENCE)
def test_trainers_without_a_reference(kind, arguments, columns, passes, tmp_path):
    run, seen = train(kind, arguments, tiny.base_model(), texts(*columns), tmp_path, passes)
    assert_clean_but_for_training(run, seen, training=STEPS, other=0)


SFT_OPTIONS = {
    "packing": {"packing": True, "max_length": 8, "packing_strategy": "wrapped"},
    "neftune": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("settings", SFT_OPTIONS.values(), ids=SFT_OPTIONS)
def test_sft_options(settings, passes, tmp_path):
    run, seen = train(SFTTrainer, SFTConfig, tiny.base_model(), texts("text"), tmp_path, passes, **settings)
    assert_clean_but_for_training(run, seen, training=STEPS, other=0)


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer, OnlineDPOTrainer])
def test_two_passes_are_refused_where_a_step_generates_its_data(kind):
    with pytest.raises(TypeError, match=rf"TwoPasses: {kind.__name__} generates the data.*one pass, such as EFMLora"):
        type("TwoPasses", (TwoPassTrainerMixin, kind), {})


@pytest.mark.parametrize("kind", [SFTTrainer, KTOTrainer, RewardTrainer])
def test_two_passes_are_allowed_elsewhere(kind):
    made = type("TwoPasses", (TwoPassTrainerMixin, kind), {})
    assert made.training_step is TwoPassTrainerMixin.training_step
