"""convert, restore: feed-forward blocks found by structure, in torch.nn and in real models."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from dashpot.experts import (
    StochasticExperts,
    SwitchExperts,
    TopKExperts,
    auxiliary_loss,
    convert,
    restore,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

D, H, E = 8, 12, 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def encoder(layers=2, **options):
    options = {"batch_first": True, **options}
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, H, **options), layers, enable_nested_tensor=True
    )


def same_keys(model, before):
    return list(model.state_dict()) == list(before) and all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )


def check_round_trip(model, call, want_names=None, **options):
    """Converted: the same function. Restored: the same bits. Twice."""
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        want = call(model)
        for _ in range(2):
            converted = convert(model, E, layers="all", **options)
            if want_names is not None:
                assert list(converted) == want_names
            assert not any(layer.training for layer in converted.values())
            torch.testing.assert_close(call(model), want, **CLOSE)
            restore(model)
            assert torch.equal(call(model), want)
            assert same_keys(model, before)
    return converted


# --------------------------------------------------------------------------------------------
# torch.nn


@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.SiLU()], ids=["relu", "gelu", "silu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_encoder(activation, norm_first, bias):
    model = encoder(activation=activation, norm_first=norm_first, bias=bias)
    x = torch.randn(2, 5, D)
    check_round_trip(model, lambda m: m(x), ["layers.0", "layers.1"])


def test_decoder_and_whole_transformer():
    model = nn.Transformer(D, 2, 2, 2, H)  # (S, B, d)
    src, tgt = torch.randn(5, 2, D), torch.randn(4, 2, D)
    names = [f"{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(2)]
    converted = check_round_trip(model, lambda m: m(src, tgt), names)
    assert all(layer.batch_dim == 1 for layer in converted.values())


def test_fused_call_in_evaluation_is_not_taken():
    """Without gradients an encoder layer runs one fused call that reads linear1.weight itself, and
    an encoder makes nested tensors of padded batches for it: experts would not be run."""
    model = encoder(3).eval()
    x, pad = torch.randn(2, 5, D), torch.zeros(2, 5, dtype=torch.bool)
    pad[1, 3:] = True
    with torch.no_grad():
        want = model(x, src_key_padding_mask=pad)
        converted = convert(model, E, layers=[1])["layers.1"]
        got = model(x, src_key_padding_mask=pad)
        torch.testing.assert_close(got[~pad], want[~pad], **CLOSE)
        converted.b2.add_(torch.randn(D))
        assert (model(x, src_key_padding_mask=pad) - got)[~pad].abs().max() > 0.1
        restore(model)
        assert torch.equal(model(x, src_key_padding_mask=pad), want)
    assert model.use_nested_tensor and model.layers[1].activation_relu_or_gelu == 1


def test_converted_twice_in_parts():
    model = encoder(3)
    state = copy.deepcopy(model.state_dict())
    assert list(convert(model, E, layers=[2])) == ["layers.2"]
    assert list(convert(model, E, layers="all")) == ["layers.0", "layers.1"]
    with pytest.raises(ValueError, match="found none"):
        convert(model, E)
    restore(model)
    assert same_keys(model, state) and model.use_nested_tensor


def test_layers_take_their_dropout_along():
    """Hidden dropout inside the experts, the rest where it was."""
    model = encoder(1, dropout=0.3)
    layer = convert(model, E)["layers.0"]
    assert layer.dropout == 0.3 and isinstance(model.layers[0].dropout, nn.Identity)
    assert model.layers[0].dropout2.p == 0.3
    restore(model)
    assert model.layers[0].dropout.p == 0.3


class Gated(nn.Module):
    def __init__(self, swap=False):
        super().__init__()
        self.one, self.two = nn.Linear(D, H), nn.Linear(D, H)
        self.three, self.act, self.swap = nn.Linear(H, D), nn.SiLU(), swap

    def forward(self, x):
        a, b = self.one(x), self.two(x)
        return self.three(self.act(b) * a if self.swap else self.act(a) * b)


class Functional(nn.Module):
    """A dropout that is no module, which the children do not show."""

    def __init__(self, p):
        super().__init__()
        self.fc1, self.fc2, self.act, self.p = nn.Linear(D, H), nn.Linear(H, D), nn.ReLU(), p

    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), self.p, self.training))


class Scaled(nn.Module):
    """Two linear layers and an activation that compute something else."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, H), nn.Linear(H, D), nn.ReLU()

    def forward(self, x):
        return 2 * self.fc2(self.act(self.fc1(x)))


def holder(module):
    return nn.ModuleDict({"block": module})


@pytest.mark.parametrize("swap", [False, True])
def test_gate_and_value_are_told_apart_by_numbers(swap):
    x = torch.randn(4, D)
    check_round_trip(holder(Gated(swap)), lambda m: m["block"](x), ["block"])


def test_sequential_with_dropouts():
    """The one before the second product goes into the experts, the one after stays after."""
    model = holder(
        nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.2), nn.Linear(H, D), nn.Dropout(0.4))
    )
    x = torch.randn(4, D)
    check_round_trip(model, lambda m: m["block"](x), ["block"])
    layer = convert(model, E)["block"]
    assert layer.dropout == 0.2 and model["block"][1].p == 0.4


@pytest.mark.parametrize(
    "module",
    [Functional(0.1), Scaled(), nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D + 1)),
     nn.Sequential(nn.Linear(D, H), nn.Dropout(0.5), nn.ReLU(), nn.Linear(H, D)),
     nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.ReLU(), nn.Linear(H, D))],
    ids=["functional dropout", "scaled", "other width", "dropout before", "norm within"],
)  # fmt: skip
def test_what_computes_something_else_is_left_alone(module):
    with pytest.raises(ValueError, match=r"model: expected feed-forward blocks .* found none"):
        convert(holder(module), E)


@pytest.mark.parametrize(
    "activation", [nn.GELU("tanh"), nn.Tanh(), nn.Mish(), nn.Identity()], ids=str
)
def test_other_activations(activation):
    model, x = (
        holder(nn.Sequential(nn.Linear(D, H), activation, nn.Linear(H, D))),
        torch.randn(4, D),
    )
    check_round_trip(model, lambda m: m["block"](x), ["block"])


def test_functional_dropout_of_zero_is_none():
    x = torch.randn(4, D)
    check_round_trip(holder(Functional(0.0)), lambda m: m["block"](x), ["block"])


def test_finding_blocks_changes_nothing():
    """Modes, dropout rates, weights and the generator are as before."""
    model = holder(nn.Sequential(nn.Linear(D, H), nn.Dropout(0.5), nn.ReLU(), nn.Linear(H, D)))
    model["block"][1].eval()
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match="found none"):
        convert(model, E)
    assert same_keys(model, state) and torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in model["block"]] == [True, False, True, True]
    assert model["block"][1].p == 0.5


def test_a_shared_block_stays_shared():
    block = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    model = nn.ModuleDict({"a": block, "b": block})
    converted = convert(model, E, layers="all")
    assert list(converted) == ["a"] and model["a"] is model["b"] is converted["a"]
    restore(model)
    assert model["a"] is model["b"] is block


def test_frozen_blocks_stay_frozen():
    model = encoder(1)
    model.layers[0].linear1.requires_grad_(False)
    layer = convert(model, E)["layers.0"]
    assert not layer.w1.requires_grad and layer.w2.requires_grad


# --------------------------------------------------------------------------------------------
# Which, and with what


def test_which_layers():
    def names(layers):
        model = nn.Transformer(D, 2, 3, 2, H, batch_first=True)
        return list(convert(model, E, layers=layers))

    alternate = ["encoder.layers.0", "encoder.layers.2", "decoder.layers.0"]
    assert names("alternate") == alternate
    assert len(names("all")) == 5
    assert names([1]) == ["encoder.layers.1", "decoder.layers.1"]
    assert names(range(2, 3)) == ["encoder.layers.2"]
    assert names(lambda i, name, module: "decoder" in name and i > 0) == ["decoder.layers.1"]
    assert names(
        lambda i, name, module: isinstance(module, nn.TransformerDecoderLayer)
    ) == ["decoder.layers.0", "decoder.layers.1"]  # fmt: skip


@pytest.mark.parametrize("experts", [StochasticExperts, TopKExperts, SwitchExperts])
def test_kinds_of_experts(experts):
    model, x = encoder(), torch.randn(2, 5, D)
    converted = convert(model, E, layers="all", experts=experts)
    assert all(type(layer) is experts for layer in converted.values())
    loss = model(x).square().mean()
    if experts is not StochasticExperts:
        loss = loss + auxiliary_loss(model)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_options_reach_the_layers():
    model = encoder()
    layer = convert(
        model, 4, level="batch", inference="average", num_passes=2, distinct_passes=True, offset=7
    )["layers.0"]
    assert (layer.E, layer.level, layer.inference, layer.num_passes) == (4, "batch", "average", 2)
    assert layer.distinct_passes and layer.offset == 7


def test_experts_are_copies_and_noise_tells_them_apart():
    model = encoder(1)
    dense = copy.deepcopy(model.layers[0])
    layer = convert(model, E)["layers.0"]
    for e in range(E):
        assert torch.equal(layer.w1[e], dense.linear1.weight)
        assert torch.equal(layer.b1[e], dense.linear1.bias)
        assert torch.equal(layer.w2[e], dense.linear2.weight)
        assert torch.equal(layer.b2[e], dense.linear2.bias)
    restore(model)
    layer = convert(model, E, noise=0.1)["layers.0"]
    spread = (layer.w1 - dense.linear1.weight).std() / dense.linear1.weight.std()
    assert 0.05 < spread < 0.2 and not torch.equal(layer.w1[0], layer.w1[1])


def test_device_and_dtype_are_the_blocks():
    model = encoder(dtype=torch.bfloat16, device="meta")
    layer = convert(model, E)["layers.0"]
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: convert("model"), TypeError, "model: expected a torch.nn.Module, got str"),
        (lambda: convert(nn.Linear(D, D)), ValueError, "found none"),
        (lambda: convert(encoder(), experts=nn.Linear), TypeError, "experts: expected a class"),
        (lambda: convert(encoder(), 0), ValueError, "E: expected 1 <= E"),
        (lambda: convert(encoder(), noise=-1), ValueError, "noise: expected a number >= 0"),
        (lambda: convert(encoder(), layers="odd"), ValueError, r"layers: expected .* got 'odd'"),
        (lambda: convert(encoder(), layers=[0, 2]), ValueError, r"below 2, got \[2\]"),
        (lambda: convert(encoder(), layers=lambda *_: False), ValueError, "selects none of the 2"),
        (lambda: convert(encoder(), dropout=0.1), ValueError, "dropout: expected not to be given"),
        (lambda: restore(encoder()), ValueError, "model: expected one that `convert` has changed"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mixed_dtypes_are_refused():
    model = encoder(1)
    model.layers[0].linear2.double()
    with pytest.raises(ValueError, match=r"layers.0: expected weights of one dtype and device"):
        convert(model, E)


# --------------------------------------------------------------------------------------------
# Undone, saved, copied


def test_restore_one_expert():
    """A dense model with the weights that one expert has now."""
    model, x = encoder(2, dropout=0.0), torch.randn(2, 5, D)
    converted = convert(model, E, layers="all", inference="fixed", fixed_expert=2, noise=0.5)
    model.eval()
    want = model(x)
    assert not torch.equal(converted["layers.0"].w1[2], converted["layers.0"].w1[0])
    with pytest.raises(ValueError, match="expert: expected 0 <= expert <= 2"):
        restore(model, expert=3)
    restore(model, expert=2)
    assert isinstance(model.layers[0].linear1, nn.Linear)
    torch.testing.assert_close(model(x), want, **CLOSE)


def test_restore_follows_dtype_and_mode():
    model = encoder(1)
    convert(model, E)
    model.double().eval()
    restore(model)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_the_block_kept_for_restore_is_no_part_of_the_model():
    model = encoder(1)
    dense = sum(p.numel() for p in model.parameters())
    block = 2 * D * H + D + H
    convert(model, E)
    assert sum(p.numel() for p in model.parameters()) == dense + (E - 1) * block
    keys = [key for key in model.state_dict() if "linear" in key]
    assert keys == [f"layers.0.linear1.{name}" for name in ("w1", "b1", "w2", "b2", "seed")]


@pytest.mark.parametrize("offset", [None, 3])
def test_state_dict_round_trip(offset):
    """Through a file into another converted model: the same outputs and routes."""
    first, second = encoder(dropout=0.0), encoder(dropout=0.0)
    for model in (first, second):
        convert(model, E, noise=0.3, offset=offset)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    x = torch.randn(2, 5, D)
    torch.manual_seed(4)
    want = first(x)
    torch.manual_seed(4)
    assert torch.equal(second(x), want)


def test_copies_can_be_restored_by_themselves():
    model = encoder(2)
    convert(model, E)
    twin = copy.deepcopy(model)
    restore(twin)
    assert isinstance(twin.layers[0].linear1, nn.Linear)
    assert isinstance(model.layers[0].linear1, StochasticExperts)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    restore(loaded)
    assert same_keys(loaded, twin.state_dict())


# --------------------------------------------------------------------------------------------
# Checkpointing, autocast, torch.compile


def test_compiled_model():
    torch._dynamo.reset()
    model, x = encoder(dropout=0.0, dtype=torch.float64), torch.randn(2, 5, D).double()
    convert(model, E, layers="all", noise=0.3, offset=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, **EXACT)
    got = torch.autograd.grad(got.square().sum(), parameters)
    want = torch.autograd.grad(want.square().sum(), parameters)
    torch.testing.assert_close(got, want, **EXACT)


def test_autocast_model():
    model, x = encoder(dropout=0.0), torch.randn(2, 5, D)
    convert(model, E, layers="all", offset=0)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)


def test_checkpointed_layers():
    model, x = encoder(dropout=0.2).double(), torch.randn(2, 5, D).double()
    convert(model, E, layers="all", noise=0.3)

    def gradients(run):
        torch.manual_seed(1)
        y = x
        for layer in model.layers:
            y = run(layer, y)
        return torch.autograd.grad(y.square().sum(), list(model.parameters()))

    plain = gradients(lambda layer, y: layer(y))
    kept = gradients(lambda layer, y: checkpoint(layer, y, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


# --------------------------------------------------------------------------------------------
# Models of Hugging Face


def hugging_face(name: str, layers: int = 2):
    """A tiny model with random weights, what it is called with, and the names of its blocks."""
    import transformers as hf

    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    words = {"input_ids": ids}
    sizes = {
        "vocab_size": 40, "hidden_size": D, "intermediate_size": H, "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }  # fmt: skip
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if name == "llama":
        config = hf.LlamaConfig(**sizes, **ends, num_key_value_heads=1)
        return hf.LlamaForCausalLM(config), words, [f"model.layers.{i}.mlp" for i in range(layers)]
    if name == "bert":
        names = [f"bert.encoder.layer.{i}.intermediate" for i in range(layers)]
        return hf.BertForMaskedLM(hf.BertConfig(**sizes)), words, names
    if name.startswith("t5"):
        config = hf.T5Config(
            vocab_size=40, d_model=D, d_ff=H, d_kv=4, num_layers=layers, num_heads=2,
            feed_forward_proj=name.removeprefix("t5-"), decoder_start_token_id=0,
        )  # fmt: skip
        parts = (("encoder", 1), ("decoder", 2))
        names = [f"{p}.block.{i}.layer.{n}.DenseReluDense" for p, n in parts for i in range(layers)]
        return hf.T5ForConditionalGeneration(config), {**words, "decoder_input_ids": ids}, names
    if name == "gpt2":  # weights as (in, out)
        config = hf.GPT2Config(vocab_size=40, n_embd=D, n_inner=H, n_layer=layers, n_head=2, **ends)
        return hf.GPT2LMHeadModel(config), words, [f"transformer.h.{i}.mlp" for i in range(layers)]
    config = hf.ViTConfig(
        hidden_size=D, intermediate_size=H, num_hidden_layers=layers, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return hf.ViTModel(config), {"pixel_values": images}, [f"layers.{i}.mlp" for i in range(layers)]


NAMES = ("llama", "bert", "t5-relu", "t5-gated-gelu", "gpt2", "vit")


@pytest.mark.peers
@pytest.mark.parametrize("name", NAMES)
def test_hugging_face_model(name):
    model, inputs, names = hugging_face(name)
    for p in model.parameters():  # biases are 0 at first
        nn.init.normal_(p, std=0.2)
    check_round_trip(model, lambda m: m(**inputs)[0], names)


@pytest.mark.peers
@pytest.mark.parametrize("name", NAMES)
def test_hugging_face_model_trains(name):
    """Under the library's own checkpointing: the same gradients as without."""
    model, inputs, _ = hugging_face(name)
    model.double().train()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    convert(model, E, level="sequence", noise=0.3)
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return {key: p.grad for key, p in parameters.items() if p.grad is not None}

    plain = gradients()
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        kept = gradients()
        for key, grad in plain.items():
            torch.testing.assert_close(kept[key], grad, **EXACT)
        assert set(kept) == set(plain)
    assert any(key.endswith("w1") and grad.any() for key, grad in plain.items())


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llama", "bert", "t5-relu"])
def test_hugging_face_model_compiled_and_under_autocast(name):
    torch._dynamo.reset()
    model, inputs, _ = hugging_face(name, layers=1)
    model.eval()
    convert(model, E, layers="all", noise=0.3, offset=0)
    with torch.no_grad():
        want = model(**inputs)[0]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs)[0], want, **CLOSE)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(**inputs)[0]
    assert torch.nn.functional.cosine_similarity(low.float(), want, dim=-1).min() > 0.98


@pytest.mark.peers
def test_hugging_face_dropout_stays_where_it_was():
    """T5's is on the hidden units, GPT-2's after the block, BERT's in the half that is kept."""
    t5 = convert(hugging_face("t5-relu")[0], E)["encoder.block.0.layer.1.DenseReluDense"]
    assert t5.dropout == 0.1
    model = hugging_face("gpt2")[0]
    gpt2 = convert(model, E)["transformer.h.0.mlp"]
    assert gpt2.dropout == 0.0 and model.transformer.h[0].mlp[1].p == 0.1
    model = hugging_face("bert")[0]
    assert next(iter(convert(model, E).values())).dropout == 0.0
    assert model.bert.encoder.layer[0].output.dropout.p == 0.1
