"""A random Llama with a tokenizer of words, and conversations, so that frameworks train without a hub."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", AXOLOTL_DO_NOT_TRACK="1", CUDA_VISIBLE_DEVICES="")
for name in [name for name in os.environ if name.startswith("FLAT_")]:
    del os.environ[name]

import peft
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
# in a process that never imports flatlora; a warning of peft would be an error
STOCK = """
import sys, warnings, torch
from transformers import AutoModelForCausalLM
import peft
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
assert type(model.peft_config["default"]) is peft.LoraConfig and "flatlora" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.arange(20)[None]).logits, sys.argv[3])
"""


def write(folder):
    """Write the model and the data sets into `folder`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids))
    model.save_pretrained(folder / "model")
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(folder / "start")
    texts = [[" ".join(WORDS[(i + j + k) % 10] for k in range(3)) for j in (0, 3, 5)] for i in range(64)]
    with open(folder / "chat.jsonl", "w") as chats, open(folder / "pairs.jsonl", "w") as pairs:
        for question, answer, other in texts:
            asked = [{"role": "user", "content": question}]
            chat = [*asked, {"role": "assistant", "content": answer}]
            chats.write(json.dumps({"messages": chat}) + "\n")
            rejected = {"role": "assistant", "content": other}
            pair = {"messages": asked, "chosen": chat[1], "rejected": rejected, "rejected_response": other}
            pairs.write(json.dumps(pair) + "\n")


def run(folder, *command):
    """Run one of a framework's own commands in `folder`."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def forked(folder, function, *args, **environment):
    """Call `function` in a copy of this process, where the framework has been imported. Faster than `run`."""
    log = folder / "log.txt"
    pid = os.fork()
    if pid == 0:
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # not those of pytest
            os.chdir(folder)
            os.environ.update(environment)
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, log.read_text()


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(first, second):
    """Whether two saved adapters are equal bit for bit."""
    first, second = tensors(first), tensors(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def strengths(checkpoint):
    """The strengths that the trainer has logged, one for each step."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry.get("flat_rho") for entry in history if "loss" in entry]


def stock_logits(folder, adapter):
    """The logits of an adapter that peft loads without flatlora."""
    paths = [str(folder / "model"), str(adapter), str(folder / "logits.pt")]
    code, output = run(folder, sys.executable, "-c", STOCK, *paths)
    assert code == 0, output
    return torch.load(folder / "logits.pt")
