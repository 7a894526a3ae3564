"""Starts that read calibration data, every one of them: codes, blocks, autocast, memory, and the command line."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ptq_models import QUICK, READ_DATA, Branches, language_model, mlp, prepared, spec, tokens
from torch import nn

import qat
from qat.layers import quant_layers
from qat.models import build
from qat.numerics import quantize, stored_scale
from qat.ptq import Options, initialise
from qat.ptq.gptq import factorize, gptq
from qat.ptq.report import set_layer
from qat.ptq.sequential import unquantized_copy
from qat.ptq.units import floats_of
from qat.quantizers.lsq import weight_step_size
from qat.spec import Init, QuantSpec


@pytest.mark.parametrize("init", READ_DATA)
def test_better_than_rounding_to_nearest(init):
    """The output of a whole language model stays closer to the unquantized one's."""
    data, reference = tokens(), language_model()
    with torch.no_grad():
        expected = [reference(batch) for batch in data]
        errors = {}
        for word in ("minmax", init):
            model = prepared(language_model(), word)
            qat.calibrate(model, data, options=Options(steps=40), verbose=False)
            errors[word] = sum((model(batch) - y).square().mean() for batch, y in zip(data, expected, strict=True))
    assert errors[init] < (0.8 if init != "awq" else 0.95) * errors["minmax"]


# The codes a method chose are those that ship


@settings(max_examples=10)
@given(
    init=st.sampled_from(READ_DATA),
    bits=st.integers(2, 8),
    grid=st.sampled_from([{"group_size": 8}, {"granularity": "channel"}, {"granularity": "tensor"}]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_codes_of_the_method_ship(init, bits, grid, dtype, tmp_path_factory):
    """Prepared model, frozen model and artifact have the same codes, and forwards use them."""
    model, x = mlp().to(dtype), [torch.randn(64, 32).to(dtype)]
    book = {"codebook": "custom", "bits": min(bits, 4)} if init == "squeezellm" else {"bits": bits}
    policy = qat.QuantPolicy(weight=QuantSpec(**book, **grid), init=init)
    qat.calibrate(qat.prepare(model, policy, verbose=False), x, options=QUICK, verbose=False)
    trained = qat.quantized_tensors(model)
    with torch.no_grad():
        for name, layer in quant_layers(model):
            assert torch.equal(layer.weight_quantizer(layer.weight), trained[name].dequantize(dtype))
    folder = tmp_path_factory.mktemp("artifact")
    qat.save(qat.freeze(model), folder)
    shipped = qat.quantized_tensors(qat.load(folder, model=mlp().to(dtype)))
    assert all(torch.equal(trained[name].codes, shipped[name].codes) for name in trained)
    assert all(torch.equal(trained[name].scale, shipped[name].scale) for name in trained)


@given(
    bits=st.integers(2, 8), seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.half])
)
def test_a_layer_keeps_the_codes_it_is_given(bits, seed, dtype):
    """Also where the weight's dtype cannot hold what was rounded, and where it lies outside of the grid."""
    torch.manual_seed(seed)
    layer = prepared(nn.Linear(32, 4).to(dtype), "gptq", bits)
    weight, step = torch.randn(4, 32), torch.rand(4, 2) * 0.1 + 0.01
    with torch.no_grad():
        set_layer(layer, weight, step)
    codes = quantize(weight, stored_scale(step, layer.weight_quantizer.spec), layer.weight_quantizer.spec)
    assert torch.equal(qat.quantized_tensors(layer)[""].codes, codes.to(torch.int8))
    kept = (layer.weight.float() - weight).abs() <= weight.abs() * torch.finfo(dtype).eps
    assert kept.float().mean() > 0.9  # training goes on from between grid points


@pytest.mark.parametrize("lr", [None, 0.3])
def test_sign_rounding_stays_within_one_code(lr):
    model, before = prepared(mlp(), "signround"), mlp()
    qat.calibrate(model, [torch.randn(64, 32)], options=Options(steps=30, lr=lr), verbose=False)
    for name, layer in quant_layers(model):
        weight, quantizer = before.get_submodule(name).weight, layer.weight_quantizer
        largest = weight_step_size(weight, quantizer.spec, Init.minmax)
        assert (quantizer.step_size <= largest * (1 + 1e-6)).all()
        step = stored_scale(quantizer.step_size, quantizer.spec).float().repeat_interleave(16, 1)
        codes = qat.quantized_tensors(model)[name].codes
        assert ((codes - (weight / step).clamp(-4, 3)).abs() <= 1.01).all()


@pytest.mark.parametrize("init", ["signround", "blockwise"])
def test_training_a_block_keeps_the_best_state(init):
    """A rate that destroys everything leaves what it started from."""
    model = prepared(mlp(), init)
    report = initialise(model, [torch.randn(64, 32)], lambda network, x: network(x), Options(steps=4, lr=50.0))
    assert report.losses["model"] <= 1
    if init == "signround":
        largest = weight_step_size(mlp()[0].weight, model[0].weight_quantizer.spec, Init.minmax)
        assert torch.equal(model[0].weight_quantizer.step_size, largest)


def test_activations_start_at_the_least_error():
    policy = qat.QuantPolicy(weight=QuantSpec(4), activation={"bits": 8}, init="gptq")
    assert qat.prepare(nn.Linear(4, 4), policy, verbose=False).activation_quantizer.init is Init.mse


# One part of the model after another


def test_every_layer_reads_inputs_behind_quantized_ones():
    """The second layer's codes are those of GPTQ on what the quantized first layer gives it."""
    model, x = prepared(mlp(depth=1), "gptq"), torch.randn(512, 32)
    weight = model[2].weight.detach().clone()
    qat.calibrate(model, [x], verbose=False)
    with torch.no_grad():
        inputs = model[1](model[0](x))
        moved, step = gptq(weight, factorize(inputs.T @ inputs / len(x), 0.01, True), spec(3, group_size=16), True)
    assert torch.allclose(model[2].weight, moved, atol=1e-5)
    assert torch.equal(model[2].weight_quantizer.step_size, step)


def test_blocks_are_run_one_at_a_time():
    """The head of a model whose blocks are quantized runs only to find them, however many there are."""
    counts = []
    for depth in (2, 5):
        model = language_model(depth)
        policy = qat.QuantPolicy(
            weight=QuantSpec(4, group_size=16), init="gptq", rules=[{"match": "lm_head", "weight": None}]
        )
        qat.prepare(model, policy, verbose=False)
        runs = []
        model.lm_head.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        qat.calibrate(model, tokens(3), verbose=False)
        counts.append(len(runs))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("rules", [[], [{"match": "blocks.1.*", "weight": None}, {"match": "lm_head", "weight": None}]])
@pytest.mark.parametrize("init", ["gptq", "gptaq"])
def test_blocks_give_what_whole_forwards_give(monkeypatch, rules, init):
    """Walking a model block by block or from the start for every layer makes no difference."""
    states = []
    for blocks in (True, False):
        if not blocks:
            monkeypatch.setattr("qat.ptq.sequential.find_blocks", lambda *_: None)
        model = prepared(language_model(), init, rules=rules)
        qat.calibrate(model, tokens(), verbose=False)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("init", ["signround", "blockwise"])
def test_all_outputs_count_where_a_model_has_several(init):
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(256, 32)
    nearest, trained = prepared(copy.deepcopy(model), "minmax"), prepared(copy.deepcopy(model), init)
    report = initialise(trained, [x], lambda model, batch: model(batch), Options(steps=50))
    with torch.no_grad():
        wanted, *found = (floats_of(net(x)) for net in (model, trained, nearest))
    ours, theirs = (sum(map(F.mse_loss, outputs, wanted)).item() for outputs in found)
    assert len(wanted) == 2 and ours < 0.95 * theirs
    assert report.losses["model"] == pytest.approx(ours / theirs, rel=1e-3)


@pytest.mark.parametrize("init", ["gptq", "signround", "blockwise"])
def test_a_decoder_with_a_config_of_its_own_keeps_no_keys_either(init):
    """T5's: its blocks would take keys and values of an earlier run, and add to them at every further one."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    assert model.decoder.config is not model.config and model.decoder.config.use_cache
    policy = qat.QuantPolicy(weight=spec(group_size=16), init=init, rules=[{"match": "lm_head", "weight": None}])
    model, kept = qat.prepare(model, policy, verbose=False), []
    for block in model.decoder.block:
        block.register_forward_pre_hook(lambda _, args, named: kept.append(named["past_key_values"]), with_kwargs=True)

    def forward(model, batch):
        return model(input_ids=batch, decoder_input_ids=batch)

    data = [torch.randint(0, 64, (4, 16)) for _ in range(2)]
    qat.calibrate(model, data, forward=forward, options=Options(steps=2), verbose=False)
    assert kept and all(cache is None for cache in kept)
    assert model.config.use_cache and model.decoder.config.use_cache and not model.encoder.config.use_cache


def test_a_key_value_cache_does_not_grow_from_run_to_run():
    """A config that asks for one gives the codes of a config that does not."""
    transformers = pytest.importorskip("transformers")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=use_cache)
        model = prepared(transformers.LlamaForCausalLM(config), "gptq", 4, rules=[{"match": "lm_head", "weight": None}])
        qat.calibrate(model, tokens(), verbose=False)
        found.append(qat.quantized_tensors(model))
    assert all(torch.equal(found[0][name].codes, found[1][name].codes) for name in found[0])


def test_an_unquantized_copy():
    """Whatever is quantized in the model: weights that have step sizes already, inputs as a runtime rounds them."""
    plain, x = mlp(), torch.randn(4, 32)
    model = qat.prepare(mlp(), qat.QuantPolicy(weight=QuantSpec(2), activation="int8_token"), verbose=False)
    assert torch.equal(unquantized_copy(model)(x), plain(x)) and not torch.equal(model(x), plain(x))
    shared = unquantized_copy(model, model[2])
    assert shared[2] is model[2] and shared[0] is not model[0]


def test_two_layers_that_share_a_weight():
    """Both are quantized, once, and stay tied; AWQ folds nothing into what is used elsewhere."""
    for init in ("gptq", "awq"):
        model = mlp(depth=3)
        model[2].weight = model[4].weight
        prepared(model, init)
        qat.calibrate(model, [torch.randn(128, 32)], verbose=False)
        found = qat.quantized_tensors(model)
        assert model[2].weight is model[4].weight and torch.equal(found["2"].codes, found["4"].codes)


def test_the_model_is_left_as_it_was():
    model = prepared(language_model(), "gptq").train()
    model.blocks[1].eval()
    qat.calibrate(model, tokens(), verbose=False)
    assert model.training and not model.blocks[1].training and model.blocks[2].training
    assert all("forward" not in block.__dict__ and not block._forward_pre_hooks for block in model.modules())
    assert all(layer.weight_quantizer.enabled for _, layer in quant_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("init", READ_DATA)
def test_memory_of_one_block_on_a_gpu(init):
    """A model in CPU memory: the GPU holds a block at a time, and almost all codes are those of a run on the CPU."""

    def calibrated(depth, device):
        torch.manual_seed(0)
        arguments = {"vocabulary": 64, "width": 512, "depth": depth, "heads": 4, "context": 64}
        model = prepared(build({"builder": "gpt", "args": arguments}), init, 4, 64)
        data = [torch.randint(0, 64, (16, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        qat.calibrate(model, data, options=Options(steps=4, device=device), verbose=False)
        assert next(model.parameters()).device.type == "cpu"
        return qat.quantized_tensors(model), torch.cuda.max_memory_allocated() - before, model

    calibrated(1, "cuda")  # the workspaces of cuBLAS and cuSOLVER, which stay
    _, of_two, _ = calibrated(2, "cuda")
    codes, of_eight, model = calibrated(8, "cuda")
    block = sum(parameter.numel() * 4 for parameter in model.blocks[0].parameters())
    assert of_eight - of_two < block  # six more blocks
    on_cpu, _, _ = calibrated(8, None)
    same = torch.cat([(codes[name].codes == on_cpu[name].codes).flatten() for name in codes]).float().mean()
    # A last bit moves a code at its edge, and GPTQ passes that on to every column and layer that follows: inputs that
    # differ by 1e-6 leave 0.8 of its codes on a CPU.
    assert same > {"gptq": 0.6, "gptaq": 0.6, "signround": 0.5, "awq": 0.9}.get(init, 0.95)


# Kinds of models


@pytest.mark.parametrize("init", READ_DATA)
def test_transformers_models(init):
    """Their blocks are found, keyword arguments and the key-value cache do not get in the way."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    reference = transformers.LlamaForCausalLM(config)
    reference.load_state_dict(model.state_dict())
    prepared(model, init, 4, rules=[{"match": "lm_head", "weight": None}])
    report = initialise(model, tokens(), lambda network, batch: network(batch), QUICK)
    assert model.config.use_cache and len(report.losses) == (2 if init in ("signround", "blockwise") else 14)
    batch = tokens()[0]
    with torch.no_grad():
        error = (model(batch).logits - reference(batch).logits).square().mean() / reference(
            batch
        ).logits.square().mean()
    assert error < 0.05


@pytest.mark.parametrize("init", READ_DATA)
def test_convolutions(init):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    data = [torch.randn(160, 3, 8, 8) for _ in range(2)]
    network = prepared(network, init, bits=4, group_size=None, activation=QuantSpec(8, granularity="tensor"))
    qat.calibrate(network, data, options=QUICK, verbose=False)
    assert all(layer.activation_quantizer.is_initialised for _, layer in quant_layers(network))
    assert network(data[0]).isfinite().all()


@pytest.mark.parametrize("init", READ_DATA)
def test_convolutions_of_several_kernels_on_one_input(init):
    """A ResNet's 3x3 convolution and its 1x1 shortcut read one tensor, and cut it into different rows."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
            self.shortcut = nn.Conv2d(4, 8, 1, stride=2)
            self.grouped = nn.Conv2d(4, 8, 1, stride=2, groups=2)

        def forward(self, x):
            return self.conv(x) + self.shortcut(x) + self.grouped(x)

    model, x = prepared(Block(), init, group_size=None), torch.randn(8, 4, 8, 8)
    qat.calibrate(model, [x], options=Options(steps=2), verbose=False)
    assert qat.quantized_tensors(model).keys() == {"conv", "shortcut", "grouped"}


# Autocast


class Exact(nn.Module):
    """Computes in float32 whatever autocast is on, and remembers whether it was."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = mlp(), set()

    def forward(self, x):
        self.seen.add(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", enabled=False):
            return self.net(x)


@pytest.mark.parametrize("init", READ_DATA)
def test_autocast_is_for_the_model_alone(init):
    """The algebra stays in float32, and the model runs in what the caller is in."""
    found, data = [], [torch.randn(64, 32)]
    for ambient in (False, True):
        model = prepared(Exact(), init)
        with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
            qat.calibrate(model, data, options=QUICK, verbose=False)
        assert model.seen == {ambient}
        found.append(qat.quantized_tensors(model))
    assert all(torch.equal(found[0][name].codes, found[1][name].codes) for name in found[0])


@pytest.mark.parametrize("init", READ_DATA)
def test_blocks_run_in_autocast(init):
    """As in training with bf16-mixed: better than round-to-nearest, with no stale cast of a weight."""
    data, reference = tokens(), language_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, errors = [reference(batch) for batch in data], {}
        for word in ("minmax", init):
            model = prepared(language_model(), word)
            qat.calibrate(model, data, options=Options(steps=40), verbose=False)
            errors[word] = sum((model(batch) - y).square().mean() for batch, y in zip(data, expected, strict=True))
    assert errors[init] < (0.8 if init != "awq" else 0.95) * errors["minmax"]


# The command line


def test_from_the_command_line_to_an_artifact(verify_here, tmp_path, monkeypatch, capsys):
    from qat import convert, train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qat.training.command_line.TRACEBACK_WANTED", False)
    small = "experiment=topics_w4 model.args.depth=2 model.args.width=32 trainer.accelerator=cpu"
    for name, more in [("ended", "trainer.max_steps=0"), ("trained", "trainer.max_steps=2")]:
        more += f" policy.init=gptq callbacks.calibration.batches=2 name={name}"
        monkeypatch.setattr(sys, "argv", ["train", *small.split(), *more.split()])
        train.main()
        assert "gptq: 8 layers, output error 0." in capsys.readouterr().out
    checkpoint, out = tmp_path / "runs" / "ended" / "last.ckpt", tmp_path / "artifact"
    assert convert.main([str(checkpoint), "--out", str(out), "--verify"]) == 0
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    assert len(layers) == 8
