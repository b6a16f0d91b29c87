"""What several tests share. No test module imports another one; they import from here.

Models:

- `tiny`: a Llama of two layers, with plain LoRA and with Flat-LoRA.
- `twin`: a float64 network, as a peft model and as plain tensors.
- `two_layers`: two linear layers with the function between them as an argument.
- `layer_cases`, `quantized_cases`, `merged_cases`: every kind of layer as data.
- `landscapes`: models whose loss surface is known in closed form.
- `diffusion`, `sentences`: a UNet of diffusers, a BERT of sentence-transformers.

What a result is compared with:

- `noise`: eps by its definition. Every other module and test takes it from there.
- `dense`: the forward of a model whose layers have the dense weight W' + eps.
- `noise_cases`: the words and normals of the noise contract.
- `rows`: a weight that is not a tensor; `triton_cases`, `triton_compiled`: the Triton kernels without a GPU.

Training:

- `methods`: all methods, and one optimizer step of any of them.
- `runs`: a Trainer, batches, and the schedule in closed form.
- `trl_runs`: TRL's trainers.
- `engines`, `engine_models`, `engine_runs`: DDP, FSDP and DeepSpeed; `method_runs`: methods with gradients there.
- `tensor_parallel`: weights that are split over processes.

Tools:

- `arguments`: every public function with right and wrong arguments.
- `internals`: the private names of flatlora that tests read, all in one place.
- `memory`: bytes that are allocated and bytes that are kept for backward.
- `processes`: several processes and commands, with time limits that grow with the load of the machine.
- `sandboxed`: generated code in the sandbox of the recipes.
- `versions`: cases of features that the oldest supported peft does not have.
"""
