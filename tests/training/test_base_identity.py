"""The identity of a base is the base's alone, and what differs is named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from fedcore.data.base_identity import PARTS, BaseIdentity, base_differences
from fedcore.errors import FedcoreError
from fedcore.training.base_identity import BLOCK, BLOCKS, identity_of, tensor_digest
from tests.training.test_quantised_base import quantised
from tests.tuners.tiny import BUILD, TARGETS, TASK, adapted, bert, llama, tokens

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tokenizer(words: str = "a b c", template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )
    made.chat_template = template
    return made


def other_base(build: Callable[[], nn.Module] = llama, seed: int = 99) -> nn.Module:
    """A base of the same shapes: its weights of two axes are drawn again."""
    model = build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def with_lora(name: str, **fields: Any) -> nn.Module:
    known = {"r": 3, "target_modules": TARGETS[name], "task_type": TASK[name]}
    return get_peft_model(BUILD[name](), LoraConfig(**{**known, **fields}))


EMBEDDINGS = {"bert": ["word_embeddings"], "llama": ["embed_tokens"], "gpt2": ["wte"]}
HEADS = {"bert": ["classifier"], "llama": ["lm_head", "embed_tokens"], "gpt2": ["lm_head"]}

WRAPPED: dict[str, Callable[[str], nn.Module]] = {
    "lora": with_lora,
    "dora": lambda name: with_lora(name, use_dora=True),
    "modules_to_save": lambda name: with_lora(name, modules_to_save=HEADS[name]),
    "trained biases": lambda name: with_lora(name, bias="all"),
    "gram": adapted,
    "tokens": lambda name: get_peft_model(
        BUILD[name](), TrainableTokensConfig(target_modules=EMBEDDINGS[name], token_indices=[1])
    ),
    "added to transformers' model": lambda name: added(BUILD[name](), name),
}


def added(model: Any, name: str) -> nn.Module:
    model.add_adapter(LoraConfig(r=3, target_modules=TARGETS[name]))
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", list(BUILD))
@pytest.mark.parametrize("wrapper", list(WRAPPED))
def test_a_wrapped_base_is_the_plain_one(name: str, wrapper: str) -> None:
    plain = identity_of(BUILD[name]())
    assert identity_of(WRAPPED[wrapper](name)) == plain
    assert plain.tensors
    # One tensor for each that the plain model saves; tied ones once.
    assert set(plain.tensors) <= set(BUILD[name]().state_dict())
    assert ("lm_head.weight" in plain.tensors) == (name == "llama")


def test_use_leaves_it_as_it_is() -> None:
    model, own = with_lora("bert"), tokenizer()
    before = identity_of(model, own)
    own(["a b", "c"], padding=True, truncation=True, max_length=4)
    own.pad_token = "a"
    model.config.use_cache = False
    model.config.pad_token_id = 7
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=tokens(), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimiser.step()
    assert identity_of(model, own) == before


def test_it_is_that_of_a_model_that_was_saved_and_loaded(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected, found = identity_of(model, tokenizer()), identity_of(loaded, again)
    assert base_differences(found, expected) == (None, ())


def changed_config() -> nn.Module:
    model = llama()
    model.config.rms_norm_eps = 0.5
    return model


def halved() -> nn.Module:
    return llama().bfloat16()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str, str]] = {
    "weights drawn by seed 99": (other_base, tokenizer, "weights", "model.embed_tokens.weight"),
    "half precision": (
        halved,
        tokenizer,
        "quantisation",
        "model.embed_tokens.weight: bfloat16 61x24, the server's float32 61x24",
    ),
    "another field": (changed_config, tokenizer, "config", "rms_norm_eps"),
    "another word": (llama, lambda: tokenizer("a b d"), "tokenizer", "model"),
    "another template": (llama, lambda: tokenizer(template="x"), "template", "chat_template"),
    "without template": (llama, lambda: tokenizer(template=None), "template", "chat_template"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_differs_is_named_and_may_be_allowed_by_name(case: str) -> None:
    build, words, part, first = CASES[case]
    expected, found = identity_of(llama(), tokenizer()), identity_of(build(), words())
    problem, allowed = base_differences(found, expected)
    assert problem is not None
    assert problem.startswith(f"its base differs from the server's in its {part}, first {first}")
    assert f"allow = ['{part}']" in problem
    assert allowed == ()
    # Where only the parts travelled, the part is named.
    brief, _ = base_differences(found.brief, expected.brief)
    assert brief is not None
    assert brief.startswith(f"its base differs from the server's in its {part}; ")
    # Allowed by its name and by none of the others.
    _, allowed = base_differences(found, expected, [part])
    assert allowed[0].endswith("as allowed")
    assert len(allowed) == 1
    others = [name for name in PARTS if name != part]
    assert base_differences(found, expected, others)[0] == problem


def test_integer_weights_are_another_base() -> None:
    plain, packed = identity_of(bert()), identity_of(quantised())
    problem, _ = base_differences(packed, plain)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    where = f"in its quantisation, first {name}: int8 24x24, the server's float32 24x24"
    assert where in str(problem)
    # Scales are in it too.
    assert name.replace("weight", "scale") in packed.tensors


def test_another_format_may_be_allowed_and_another_base_of_that_format_is_not() -> None:
    """What both store alike, embeddings and norms, has to be equal."""
    plain, packed = identity_of(bert()), identity_of(quantised())
    problem, allowed = base_differences(packed, plain, ["quantisation"])
    assert problem is None
    assert len(allowed) == 1
    foreign = quantised()
    with torch.no_grad():
        foreign.bert.embeddings.word_embeddings.weight.add_(1)  # type: ignore[union-attr, operator]
    problem, _ = base_differences(identity_of(foreign), plain, ["quantisation"])
    assert "in its weights, first bert.embeddings.word_embeddings.weight" in str(problem)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bits_beside_fp32_are_refused_and_scales_are_compared() -> None:
    import bitsandbytes as bnb

    def packed() -> nn.Module:
        model = llama()
        for layer in model.model.layers:  # type: ignore[union-attr]
            plain = layer.self_attn.q_proj
            low = bnb.nn.Linear4bit(24, 24, bias=False, quant_type="nf4")
            low.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False)
            layer.self_attn.q_proj = low.to("cpu")
        return model

    expected, found = identity_of(llama()), identity_of(packed())
    problem, _ = base_differences(found, expected)
    assert "in its quantisation, first model.layers.0.self_attn.q_proj.weight: uint8" in str(
        problem
    )
    assert identity_of(packed()) == found
    assert any("absmax" in name for name in found.tensors)
    model = packed()
    model.model.layers[1].self_attn.q_proj.weight.quant_state.absmax.mul_(2)  # type: ignore[union-attr, index]
    problem, _ = base_differences(identity_of(model), found)
    assert "first model.layers.1.self_attn.q_proj.weight.absmax" in str(problem)


@settings(max_examples=30)
@given(st.data())
def test_every_tensor_counts_and_is_named(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(BUILD)))
    model = BUILD[name]()
    expected = identity_of(model)
    tensor = data.draw(st.sampled_from(list(expected.tensors)))
    values = model.state_dict()[tensor]
    place = data.draw(st.integers(0, values.numel() - 1))
    flat = values.view(-1)
    flat[place] = flat[place] + 1 if values.is_floating_point() else ~flat[place]
    problem, _ = base_differences(identity_of(model), expected)
    assert f"in its weights, first {tensor};" in str(problem)


def test_sampled_blocks_see_another_tensor_and_full_sees_one_number() -> None:
    tensor = torch.zeros(300, 300)
    assert tensor.nbytes > BLOCKS * BLOCK
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    before = tensor_digest("w", tensor)
    assert tensor_digest("w", noise) != before
    unseen = 0
    for i in range(0, 90_000, 900):
        one = tensor.clone()
        one.view(-1)[i] = 1
        unseen += tensor_digest("w", one) == before
        assert tensor_digest("w", one, "full") != tensor_digest("w", tensor, "full")
    # The blocks are 18% of this tensor, and overlaps make them fewer.
    assert 70 <= unseen <= 95
    # Another name, other blocks.
    assert tensor_digest("v", tensor) != before


def test_the_same_bytes_give_the_same_digest_on_every_machine() -> None:
    """Written down once: sites of other versions have to agree."""
    small = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    large = torch.arange(90_000, dtype=torch.float32)
    digests = [tensor_digest("a.weight", small), tensor_digest("a.weight", large)]
    assert digests == GOLDEN
    assert tensor_digest("a.weight", small.T.contiguous().T) == GOLDEN[0]


GOLDEN = ["70bb272e66138868", "9e88ca28affbfa30"]


def test_modes_are_not_compared_with_each_other() -> None:
    full = identity_of(bert(), mode="full")
    problem, _ = base_differences(identity_of(bert()), full)
    assert "was measured sampled, the server's full; set model.identity" in str(problem)
    assert base_differences(identity_of(bert(), mode="full"), full) == (None, ())
    with pytest.raises(FedcoreError, match="unknown mode 'ful'; did you mean full"):
        identity_of(bert(), mode="ful")


def test_a_tokenizer_is_compared_where_it_is_announced() -> None:
    expected = identity_of(llama(), tokenizer())
    problem, _ = base_differences(identity_of(llama()), expected)
    assert "it does not say the tokenizer of its base" in str(problem)
    assert "pass the tokenizer to FederatedClient" in str(problem)
    assert base_differences(identity_of(llama(), tokenizer()), identity_of(llama())) == (None, ())


def test_what_an_adapter_replaces_can_be_left_out() -> None:
    """A classifier's head is drawn anew at every site and comes with the broadcast."""
    one, other = bert(), bert()
    with torch.no_grad():
        other.classifier.weight.add_(1)  # type: ignore[union-attr, operator]
    problem, _ = base_differences(identity_of(one), identity_of(other))
    assert "first classifier.weight" in str(problem)
    heads = ["classifier.weight", "classifier.bias"]
    left = [identity_of(model).without(heads) for model in (one, other)]
    assert left[0] == left[1]
    assert "classifier.weight" not in left[0].tensors
    assert left[0].without(heads) == left[0]
    assert left[0].without(["bert.pooler"]) != left[0]


def test_values_that_are_not_in_memory_are_said() -> None:
    with pytest.raises(FedcoreError, match="the values of weight are not in memory"):
        identity_of(nn.Linear(2, 2, device="meta"))


def test_a_file_brings_it_back_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    identity = identity_of(llama(), tokenizer())
    assert BaseIdentity.read(tmp_path) is None
    file = identity.save(tmp_path)
    assert BaseIdentity.read(tmp_path) == identity
    assert list(BaseIdentity.read(tmp_path).tensors) == list(identity.tensors)  # type: ignore[union-attr]
    about = json.loads(file.read_text())
    about["entries"]["weights"][0][1] = "0" * 16
    file.write_text(json.dumps(about))
    with pytest.raises(FedcoreError, match="the parts of its base identity are not of its entries"):
        BaseIdentity.read(tmp_path)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in ``value`` with each of its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    here = [(value, key) for key, _ in inner]
    values = value.values() if isinstance(value, dict) else value
    return here + [p for v in values if isinstance(v, dict | list) for p in places(v)]


ODD = [None, True, 0, -1, 10**40, 1.5, "", "x", "\n", "0" * 32, [], [[]], [["a"]], {}, {"a": 1}]


@settings(max_examples=200)
@given(st.data())
def test_foreign_json_is_an_identity_or_an_error(data: st.DataObject) -> None:
    about = copy.deepcopy(SMALL.to_json())
    container, key = data.draw(st.sampled_from(places(about)))
    container[key] = data.draw(st.sampled_from(ODD))
    problem = ""
    try:
        found = BaseIdentity.from_json(about, "site-1")
        assert all(len(digest) == 32 for digest in found.parts.values())
    except FedcoreError as error:
        problem = str(error)
    assert not problem or problem.startswith("site-1: ")


SMALL = identity_of(nn.Linear(2, 2), tokenizer())


def test_it_needs_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import fedcore.training.base_identity\n"
        "heavy = {'pydantic', 'transformers', 'peft'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
