import logging

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
)

from fedcore.errors import FedcoreError
from fedcore.training.layers import find_layers
from fedcore.training.models import load_classifier
from fedcore.training.prefix import FrozenPrefix
from tests.training.prefix_models import (
    LAYERS,
    MODELS,
    TOKENS,
    WIDTH,
    assert_equal_steps,
    bert,
    examples,
    llama,
    lora,
    make,
    step,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_plain_model(name: str, training: bool) -> None:
    model = make(name, [2, 3])
    data = examples()
    prefix = FrozenPrefix.find(model)
    assert prefix is not None
    assert (prefix.length, prefix.width) == (2, WIDTH)
    states = prefix.compute(data, batch_size=4)
    assert states.shape == (6, TOKENS, WIDTH)
    assert prefix.nbytes(6, TOKENS) == states.nbytes
    if training:
        # Dropout after the prefix draws the same numbers in both passes: the prefix draws none.
        model.train()
        prefix.eval_prefix()
    for rows in ([0, 1, 2, 3, 4, 5], [5, 0, 3], [1]):
        assert_equal_steps(model, prefix, data.take(rows), states[rows])


@pytest.mark.parametrize("name", MODELS)
def test_head_only_training_reuses_every_layer(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = model.score if hasattr(model, "score") else model.classifier
    head.requires_grad_(True)
    prefix = FrozenPrefix.find(model)
    assert prefix is not None
    assert prefix.length == LAYERS
    data = examples()
    states = prefix.compute(data, batch_size=6)
    assert_equal_steps(model, prefix, data, states)


def test_the_prefix_is_not_run_while_reused() -> None:
    model = make("llama", [3])
    prefix = FrozenPrefix.find(model)
    data = examples()
    states = prefix.compute(data, batch_size=6)
    calls = []
    for i, layer in enumerate(model.base_model.model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
    with prefix.reuse():
        prefix.feed(states)
        model(input_ids=data.input_ids, attention_mask=data.attention_mask)
    assert calls == [3]


def test_fed_states_and_not_the_inputs_decide_the_output() -> None:
    model = make("bert", [3])
    prefix = FrozenPrefix.find(model)
    data = examples()
    states = prefix.compute(data, batch_size=6)
    with prefix.reuse(), torch.no_grad():
        outputs = []
        for fed in (states, states.flip(0)):
            prefix.feed(fed)
            outputs.append(
                model(input_ids=data.input_ids, attention_mask=torch.ones_like(data.input_ids))
            )
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits.flip(0))


@pytest.mark.parametrize("name", MODELS)
def test_dropout_of_the_prefix_is_off_and_the_rest_trains(name: str) -> None:
    model = make(name, [2, 3])
    prefix = FrozenPrefix.find(model)
    model.train()
    prefix.eval_prefix()
    assert model.training
    layers = model.get_submodule(prefix.layers)
    for i, layer in enumerate(layers):
        assert {module.training for module in layer.modules()} == {i >= 2}
    entered: list = []
    hook = layers[1].register_forward_hook(lambda _, __, out: entered.append(out))
    data = examples()
    for _ in range(2):
        model(input_ids=data.input_ids, attention_mask=data.attention_mask)
    hook.remove()
    first, second = (out if isinstance(out, Tensor) else out[0] for out in entered)
    assert torch.equal(first, second)
    assert torch.equal(first, prefix.compute(data, batch_size=6))
    assert model.training


def test_everything_is_put_back() -> None:
    model = make("gpt2", [2])
    data = examples()
    model.train()
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    torch.manual_seed(0)
    random = torch.random.get_rng_state()
    prefix = FrozenPrefix.find(model)
    states = prefix.compute(data, batch_size=5)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    model.eval()

    def fail() -> None:
        with prefix.reuse():
            prefix.feed(states)
            raise KeyError("in between")

    with pytest.raises(KeyError, match="in between"):
        fail()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert after == hooks
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())


def test_a_forward_that_was_replaced_before_is_put_back() -> None:
    model = make("bert", [3])
    layer = model.base_model.model.bert.encoder.layer[0]
    own = layer.forward
    wrapper = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731
    layer.forward = wrapper
    prefix = FrozenPrefix.find(model)
    with prefix.reuse():
        assert layer.forward is not wrapper
    assert layer.forward is wrapper


def test_layers_that_return_tuples_are_handled() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple:
            return (torch.tanh(self.linear(hidden_states)) * scale, None)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 4)
            self.h = nn.ModuleList([Layer() for _ in range(3)])
            self.head = nn.Linear(4, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple:
            hidden = self.embed(input_ids)
            for layer in self.h:
                hidden, nothing = layer(hidden_states=hidden, scale=0.5)
                assert nothing is None
            return (self.head(hidden.mean(1)),)

    model = Model().eval()
    trained = ["h.2.linear.weight", "head.weight"]
    prefix = FrozenPrefix.find(model, trained)
    data = examples()
    states = prefix.compute(data, batch_size=2)
    plain = model(data.input_ids, data.attention_mask)[0]
    with prefix.reuse():
        prefix.feed(states)
        torch.testing.assert_close(model(data.input_ids, data.attention_mask)[0], plain)


def test_gradient_checkpointing_of_the_trained_layers_changes_nothing() -> None:
    model = make("llama", [2, 3])
    data = examples()
    prefix = FrozenPrefix.find(model)
    states = prefix.compute(data, batch_size=6)
    model.train()
    prefix.eval_prefix()
    _, wanted = step(model, data)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    with prefix.reuse():
        prefix.feed(states)
        _, found = step(model, data)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6)


def test_names_of_trained_parameters_replace_the_flags() -> None:
    model = bert()
    assert FrozenPrefix.find(model) is None
    last = "bert.encoder.layer.3.output.dense.weight"
    model.requires_grad_(False)
    assert FrozenPrefix.find(model, [last]).length == 3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(FedcoreError, match="trainable holds 'nope', which is not a parameter"):
        FrozenPrefix.find(model, [last, "nope"])


def test_an_adapter_that_is_frozen_this_round_still_ends_the_prefix() -> None:
    model = make("bert", [1, 3])
    for name, parameter in model.named_parameters():
        if "layer.1." in name:
            parameter.requires_grad_(False)
    assert FrozenPrefix.find(model).length == 1


def _why(model: nn.Module, caplog, trainable: list[str] | None = None) -> str:
    reason = FrozenPrefix.why_not(model, trainable)
    with caplog.at_level(logging.INFO, logger="fedcore.training.prefix"):
        assert FrozenPrefix.find(model, trainable) is None
    assert caplog.messages[-1] == f"no frozen prefix to reuse: {reason}"
    return reason


def test_why_there_is_no_prefix(caplog) -> None:
    last = "bert.encoder.layer.3.output.dense.weight"
    reason = _why(make("bert", None), caplog)
    assert reason == "the first layer, base_model.model.bert.encoder.layer.0, is trained or adapted"
    embedding = "bert.embeddings.word_embeddings.weight"
    reason = _why(bert(), caplog, [last, embedding])
    assert reason == f"the trained parameter {embedding} is used before the layers"
    bart = BartForSequenceClassification(
        BartConfig(
            vocab_size=50,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=32,
        )
    )
    assert _why(bart, caplog) == "the model is an encoder-decoder"
    assert _why(nn.Linear(2, 2), caplog) == "the model has no list of layers of one class"
    assert FrozenPrefix.why_not(make("bert", [3])) is None


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_trained_prompts_feed_the_first_layer(config: type, caplog) -> None:
    model = get_peft_model(llama(), config(task_type="SEQ_CLS", num_virtual_tokens=2))
    reason = _why(model, caplog)
    assert reason.startswith("the trained parameter prompt_encoder.")


def test_layers_that_share_more_than_hidden_states_are_refused(caplog) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, memory: list) -> Tensor:
            memory.append(hidden.sum())
            return self.linear(hidden) + sum(memory)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 4)
            self.layers = nn.ModuleList([Layer() for _ in range(3)])

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple:
            hidden, memory = self.embed(input_ids), []
            for layer in self.layers:
                hidden = layer(hidden, memory)
            return (hidden,)

    torch.manual_seed(0)
    reason = _why(Model(), caplog, ["layers.2.linear.weight"])
    assert reason.startswith("reused states change the output by")


def test_misuse_of_reuse_is_refused() -> None:
    model = make("bert", [3])
    data = examples()
    prefix = FrozenPrefix.find(model)
    states = prefix.compute(data, batch_size=6)
    inputs = {"input_ids": data.input_ids, "attention_mask": data.attention_mask}
    with pytest.raises(FedcoreError, match=r"outside of reuse\(\)"):
        prefix.feed(states)
    with prefix.reuse():
        with pytest.raises(FedcoreError, match=r"call feed\(\) before each one"):
            model(**inputs)
        with pytest.raises(FedcoreError, match=rf"\(6, 7, 3\); expected \(B, T, {WIDTH}\)"):
            prefix.feed(states[..., :3])
        prefix.feed(states[:2])
        with pytest.raises(FedcoreError, match=r"shape \(2, 7, 16\); this batch has \(6, 7, 16\)"):
            model(**inputs)
        prefix.feed(states)
        model(**inputs)
        with pytest.raises(FedcoreError, match=r"call feed\(\) before each one"):
            model(**inputs)
        with pytest.raises(FedcoreError, match="being reused already"), prefix.reuse():
            pass
    model.train()
    with pytest.raises(FedcoreError, match=r"train mode; call eval_prefix\(\)"), prefix.reuse():
        pass
    with pytest.raises(FedcoreError, match="batch_size is 0"):
        prefix.compute(data, batch_size=0)


def test_experts_inside_layers_are_not_taken_for_layers() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(8)])

    model = nn.ModuleDict(
        {"mixed": nn.ModuleList([nn.Linear(2, 2), nn.ReLU()] * 9), "layers": nn.ModuleList()}
    )
    model["layers"].extend([Layer() for _ in range(3)])
    name, layers = find_layers(model)
    assert name == "layers"
    assert len(layers) == 3


def test_minilm_with_lora_in_its_last_two_layers() -> None:
    model, _ = load_classifier("minilm", 5, seed=0)
    model = lora(model, ["query", "value"], [4, 5])
    prefix = FrozenPrefix.find(model)
    assert (prefix.length, prefix.width) == (4, 384)
    assert prefix.nbytes(2125, 128) == 2125 * 128 * 384 * 4
    data = examples(n=6, vocabulary=30000, tokens=24)
    states = prefix.compute(data, batch_size=4)
    model.train()
    prefix.eval_prefix()
    assert_equal_steps(model, prefix, data, states)
