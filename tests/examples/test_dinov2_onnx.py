"""DINOv2 out of an ONNX graph: one that is made here of a tiny model, and the packaged one."""

import pytest
import torch
from common import dinov2
from transformers import Dinov2Config, Dinov2Model

onnx = pytest.importorskip("onnx")
TINY = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
OLD_NAMES = {new: old for old, new in dinov2.NEW_NAMES.items()}


def tensor(name, value):
    return onnx.numpy_helper.from_array(value.detach().contiguous().numpy(), name)


def graph_of(model):
    """The graph that an export of the model, as `backbone`, has: products under names of their own, and positions."""
    nodes, initializers = [], []
    for name, weight in model.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        if "position" in name or "mask_token" in name:
            continue
        if weight.dim() == 2:  # of a linear layer
            number = f"onnx::MatMul_{len(initializers)}"
            node = "/backbone/" + name.replace(".", "/").removesuffix("weight") + "MatMul"
            node = node.replace("/layer/", "/layer.")
            nodes.append(onnx.helper.make_node("MatMul", ["x", number], ["y"], name=node))
            initializers.append(tensor(number, weight.T))
        else:
            initializers.append(tensor(f"backbone.{name}", weight))
    positions = model.state_dict()["embeddings.position_embeddings"]
    initializers += [tensor("onnx::Concat_1", positions[:, :1]), tensor("onnx::Reshape_2", positions[:, 1:])]
    for x in initializers[-2:]:
        nodes += [onnx.helper.make_node("Reshape", [x.name], ["y"], name="/backbone/embeddings/Reshape")]
    initializers.append(tensor("onnx::MatMul_of_the_decoder", torch.ones(2, 2)))
    nodes.append(onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_of_the_decoder"], ["y"], name="/decoder/MatMul"))
    return onnx.helper.make_graph(nodes, "exported", [], [], initializers)


def test_the_converted_model_is_the_exported_one():
    torch.manual_seed(0)
    model = Dinov2Model(TINY).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    found = dinov2.convert(graph_of(model), TINY)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(found(images).last_hidden_state, model(images).last_hidden_state)


def test_a_graph_without_a_weight_is_refused():
    graph = graph_of(Dinov2Model(TINY))
    graph.initializer.remove(next(x for x in graph.initializer if x.name.endswith("layer.1.norm2.weight")))
    with pytest.raises(RuntimeError, match="layer.1.norm2.weight"):
        dinov2.convert(graph, TINY)


def test_a_model_that_answers_otherwise_is_refused():
    torch.manual_seed(0)
    model = Dinov2Model(dinov2.SMALL).eval()
    with pytest.raises(ValueError, match="must answer as the original does, to 1e-4; it is off by"):
        dinov2.check(model)


@pytest.mark.slow
@pytest.mark.thorough
def test_the_packaged_model_answers_as_the_original_in_onnxruntime():
    dinov2.check(Dinov2Model.from_pretrained(dinov2.dinov2_folder()).eval())
