"""What `trl sft` does, with the keys flat_...

python examples/yaml/trl_sft.py --config examples/yaml/trl.yaml
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from flatlora import FlatLoraCallback
from flatlora.integrations.flat_arguments import FlatArguments, prepare_trainer

parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, FlatArguments))
script, args, model, flat = parser.parse_args_and_config(fail_with_unknown_args=True)
loading = {"dtype": model.dtype, "quantization_config": get_quantization_config(model)}
args.model_init_kwargs = {**{name: x for name, x in loading.items() if x is not None}, **(args.model_init_kwargs or {})}
data = load_dataset(script.dataset_name, script.dataset_config)
trainer = SFTTrainer(
    model.model_name_or_path,
    args=args,
    train_dataset=data[script.dataset_train_split],
    eval_dataset=data[script.dataset_test_split] if args.eval_strategy != "no" else None,
    peft_config=flat.config(get_peft_config(model)),
)
prepare_trainer(trainer, FlatLoraCallback())  # also runs the second pass of fmlora and lora_sam
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
trainer.save_model(args.output_dir)
